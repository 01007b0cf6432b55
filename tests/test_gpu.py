"""extras/gpu.py: all stages on a CPU with a tiny model; what is done is not done again; what fails is told."""

import contextlib
import importlib
import sys

import pytest
from conftest import refuses
from test_bench import write_shop

from extras import gpu
from hatllm import InputError
from model import read_json


def in_this_process(command: list[str], seconds: float, log) -> int:
    """A stage, without the seconds that a new process takes to import torch."""
    if command[2] == "pytest":
        log.write_text("1 passed in 0.01s")
        return 0
    with open(log, "w") as file, contextlib.redirect_stdout(file):
        try:
            importlib.import_module(command[2]).main(command[3:])
        except InputError as e:
            print(f"error: {e}")
            return 1
    return 0


def test_all_stages_and_again(frozen_heap, tmp_path, monkeypatch, capsys):
    """Without peft one stage fails, and says why. The same command then begins with it."""
    pytest.importorskip("peft")
    write_shop(tmp_path)
    argv = ["--toy", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(gpu, "call", in_this_process)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        gpu.main(argv)
    done = read_json(tmp_path / "out/gpu.json")
    lacking = done.pop("train random-toy, LoRA")
    assert lacking["state"] == "failed" and lacking["last lines"][-1].startswith("error: bench compares with peft: pip")
    assert {s["state"] for s in done.values()} == {"done"} and len(done) == 6
    assert done["parity"]["result"]["float32"]["within"] and done["parity"]["result"]["bfloat16"]["within"]
    assert (
        done["train random-toy, full"]["result"]["losses agree"]
        and len(done["decode random-toy"]["result"]["rows"]) == 3
    )
    assert (
        len(done["profile random-toy"]["result"]["top"]) == 15 and done["profile random-toy"]["result"]["idle"] is None
    )
    text = (tmp_path / "out/gpu.md").read_text()
    assert "bench compares with peft" in text and "| OR | 0 |" in text and "| IN:1/4 OR CR:1/4 | 0 |" in text
    capsys.readouterr()
    gpu.main([*argv, "--minutes", "0"])
    told = capsys.readouterr().out
    assert told.count("done already") == 6 and "train random-toy, LoRA: no time is left" in told
    gpu.main(argv)
    assert capsys.readouterr().out.count("done already") == 6
    assert {s["state"] for s in read_json(tmp_path / "out/gpu.json").values()} == {"done"}


def test_processes(tmp_path):
    """A command that fails; one whose time is up, which is interrupted; a JSON line, which is the result."""
    log = tmp_path / "log"
    failed = gpu.run_stage(["json.tool", str(tmp_path / "none.json")], 60, log)
    assert failed["state"] == "failed" and "none.json" in failed["last lines"][-1] and failed["result"] is None
    done = gpu.run_stage(["timeit", "-n1", "-r1", """print('more'), print('{"a": 1}')"""], 60, log)
    assert (done["state"], done["result"]) == ("done", {"a": 1}) and done["last lines"][0] == "more"
    late = gpu.run_stage(["timeit", "-n", "1", "import time; time.sleep(100)"], 0.5, log)
    assert late["state"] == "out of time" and late["seconds"] < 10 and "KeyboardInterrupt" in log.read_text()


def test_no_such_model(tmp_path):
    with refuses("--model nowhere", "*.safetensors"):
        gpu.main(["--model", "nowhere", "--out", str(tmp_path)])
