"""The one exception that the command line shows without a traceback."""


class UserError(Exception):
    """Something the user can put right; the message says what and how."""

    in_all = True  # where several processes train, all meet it, and one need say it
