# What scripts/wheel --try SUITE runs in its root: gets the wheels that weightd needs beside Debian's torch.
python3 -m venv --system-site-packages /fetch
wheel=$(echo /wheels/weightd-*.whl)
resolve() { /fetch/bin/pip install -q --dry-run -c /wheels/constraints.txt "$@"; }
resolve --report /fetch/all "$wheel[import,serve]"
resolve --report /fetch/core --ignore-installed "$wheel" # for the environment that does not see Debian's packages
python3 - >/fetch/list <<'PYTHON'
import json

found = [one["metadata"] for name in ("all", "core") for one in json.load(open(f"/fetch/{name}"))["install"]]
print(*{f"{one['name']}=={one['version']}" for one in found if one["name"] != "weightd"}, sep="\n")
PYTHON
/fetch/bin/pip download -q --no-deps -d /wheels -r /fetch/list
