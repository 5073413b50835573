"""Print what the installed package needs for its tests, without upper bounds: `pip install -r` takes the newest.

`make test-newest` uses it to try versions that the package does not admit yet.
"""

import re
from importlib import metadata

EXTRAS = ("examples", "plot", "safetensors", "test", "yaml")

found = {}
for line in metadata.requires("lightning-plugins") or ():
    requirement, _, condition = line.partition(";")
    extra = re.search(r"extra == ['\"]([\w-]+)['\"]", condition)
    if not requirement.startswith("lightning-plugins[") and (extra is None or extra[1] in EXTRAS):
        found[re.sub(r"<=?[^,]*,?", "", requirement).strip().rstrip(",")] = None
print("\n".join(found))  # noqa: T201
