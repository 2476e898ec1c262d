"""Two files of collect.py, row by row: compare.py OLD.json NEW.json"""

import json
import sys
from collections import defaultdict

old, new = (json.load(open(path)) for path in sys.argv[1:])
groups = defaultdict(list)
for case in old:
    assert [row[:2] for row in old[case]] == [row[:2] for row in new[case]], case
    kind = case.split(", ", 1)[1]
    for (_, name, a), (_, _, b) in zip(old[case], new[case], strict=True):
        groups[kind, name].append(abs(a - b))
for (kind, name), found in groups.items():
    equal = sum(difference == 0 for difference in found)
    print(f"{kind:30} {name:8} {equal:4} of {len(found):4} bit-equal, largest difference {max(found):.1e}")
