def write_audit(summary, out): pass
