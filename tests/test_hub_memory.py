"""A large model is pushed and pulled without ever being in memory several times. As in `test_hub_push`, over HTTP."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_uploads import WritableHub
from test_hub_loading import environment
from test_hub_push import forget_files

MAKE = """
import sys, timm
from timm.models._hub import save_for_hf
model = timm.create_model("vit_base_patch16_224", num_classes=10)
save_for_hf(model, sys.argv[1], {"label_names": [str(i) for i in range(10)]}, safe_serialization=True)
"""
PEAK = """
import re, sys
def peak():  # of this program: getrusage also counts the process that it was forked from
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
PUSH = f"""{PEAK}
from arrest_hub.push_cli import push_command
push_command([sys.argv[1], "--repo-id", "me/large", "--license", "mit"])
print(peak())
"""
PULL = f"""{PEAK}
import arrest_hub, arrest_hub.pretrained
imported = peak()  # PyTorch and timm alone take some hundred megabytes
arrest_hub.from_pretrained("me/large")
print(peak() - imported)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a program's own peak")
def test_peak_memory_of_a_large_model(tmp_path):
    from tiny import tiny_config

    from arrest_hub.train import finetune

    run = finetune(tiny_config(tmp_path, epochs=1, max_steps=1)).path
    weights = run / "export" / "model.safetensors"

    def child(code: str, *arguments: str) -> str:
        home = tmp_path / f"home-{hash(code)}"
        settings = environment(hub.url, home, HF_TOKEN="hf_me", TMPDIR=str(tmp_path))
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=settings,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.split()[-1] if result.stdout else ""

    with WritableHub() as hub:
        hub.add_user("hf_me", "me")
        child(MAKE, str(run / "export"))
        forget_files(run)
        size = weights.stat().st_size
        assert size > 300e6
        pushed = int(child(PUSH, str(run)))
        pulled = int(child(PULL))
        assert Path(hub.files("me/large")["model.safetensors"]).stat().st_size == size
    shutil.rmtree(tmp_path)
    print(f"push: {pushed / size:.2f} times the model's size in all; pull: {pulled / size:.2f} times over the imports")
    assert pushed < 2.5 * size
    assert pulled < 2.5 * size
