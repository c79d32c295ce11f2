# What scripts/wheel --try runs in a root that has only Python and the wheels: a new user's first commands.
for tool in cc gcc g++ cmake ninja; do
    ! command -v $tool >/dev/null || { echo "$tool is there: this root proves nothing" >&2 && exit 1; }
done
python3 --version
echo "--- the core alone says what is missing"
python3 -m venv /core
/core/bin/pip install -q --no-index --find-links /wheels weightd
/core/bin/weightd --version
status=0
/core/bin/flashclient run /relu-6m 2>/core/said || status=$?
cat /core/said
[[ $status == 1 && $(cat /core/said) == *"pip install 'weightd[client]'"* ]]
echo "--- with all that imports, generates and serves"
python3 -m venv --system-site-packages /env # where scripts/wheel has installed it, torch is Debian's
/env/bin/pip install -q --no-index --find-links /wheels 'weightd[import,serve]'
PATH=/env/bin:$PATH
python3 -c "import torch; print('torch', torch.__version__)"
weightd import /relu-6m --store /store
weightd verify --store /store
echo "--- a service of the system"
weightd install-service
id weightd
grep ExecStart= /etc/systemd/system/weightd.service
weightd cert --out /tls --host localhost --client me
echo "--- text"
flashclient generate relu-6m "def add(a, b):" --store /store --temperature 0 -n 16
flashclient serve relu-6m --store /store --port 8001 >/served 2>&1 &
trap 'kill $!' EXIT
python3 - <<'PYTHON'
import json, time, urllib.error, urllib.request

def post(path, body):
    request = urllib.request.Request(f"http://127.0.0.1:8001{path}", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request, timeout=60))

for _ in range(120):
    try:
        urllib.request.urlopen("http://127.0.0.1:8001/health", timeout=5)
        break
    except OSError:
        time.sleep(0.5)
print(post("/v1/completions", {"model": "relu-6m", "prompt": "def add(a, b):", "max_tokens": 16, "temperature": 0}))
PYTHON
