"""What train.py and eval.py share and is not about recommendation: flags, devices, files that are whole, processes."""

import argparse
import difflib
import inspect
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hatllm import InputError

DTYPES = ("auto", "float32", "bfloat16")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def parse_flags(cls, argv: list[str], doc: str):
    """A dataclass whose fields each end in a comment -> an instance with the values of argv. The comment is the help:
    a constant stands in one place only. bool: --flag, or --flag true|false. Raises InputError."""
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, f in cls.__dataclass_fields__.items():
        shown = f" (default: {f.default})" if f.default not in ("", ()) else ""
        more = {bool: {"type": boolean, "nargs": "?", "const": True}, tuple: {"nargs": "+"}}.get(
            f.type, {"type": f.type}
        )
        p.add_argument(f"--{name}", default=f.default, help=(helps[name] + shown).replace("%", "%%"), **more)
    known, unknown = p.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0], cls.__dataclass_fields__, 1)
        raise InputError(
            f"unknown argument {unknown[0]}" + (f"; did you mean --{near[0]}?" if near else "; see --help")
        )
    return cls(**vars(known))


def choose(flag: str, value: str, known: tuple) -> str:
    if value not in known:
        near = difflib.get_close_matches(value, known, 1) or known
        raise InputError(f"--{flag} {value} is none of {', '.join(known)}; did you mean {near[0]}?")
    return value


def device_and_dtype(dtype: str, model: str = "") -> tuple[torch.device, torch.dtype]:
    """auto: bfloat16 where the hardware multiplies it faster; for the tiny model on a GPU only."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if choose("dtype", dtype, DTYPES) == "auto":
        has = torch.cpu.get_capabilities() if device.type == "cpu" and model != "tiny" else {}
        fast = has.get("avx512_bf16") or has.get("amx_bf16")
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else fast
        dtype = "bfloat16" if fast else "float32"
    return device, getattr(torch, dtype)


def write_json(path: Path, value):
    """Whole or not at all. A list is written line by line."""
    text = "".join(json.dumps(v) + "\n" for v in value) if isinstance(value, list) else json.dumps(value, indent=1)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        sync(part)
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise InputError(f"{path} could not be written ({e})") from e


def sync(path: Path):
    """Waits until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def newest(out: Path, kind: str) -> Path | None:
    """out/KIND-000123 with the highest number; it was renamed to that name when complete."""
    return max((p for p in out.glob(f"{kind}-*") if p.name[len(kind) + 1 :].isdigit()),
               key=lambda p: int(p.name[len(kind) + 1 :]), default=None)  # fmt: skip


def write_folder(place: Path, write):
    """write(folder) into a folder beside place, everything on disk, then renamed to place."""
    part = place.with_name(place.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
        for file in [*part.iterdir(), part]:
            sync(file)
        shutil.rmtree(place, ignore_errors=True)
        os.rename(part, place)
        sync(place.parent)  # before the caller removes what this folder replaces
    except Exception as e:  # a full disk reaches us as OSError or as safetensors' own error
        shutil.rmtree(part, ignore_errors=True)
        raise InputError(
            f"{place} could not be written ({e}); the checkpoint before it is intact, go on with --resume"
        ) from e


class World:
    """One process of torchrun's, or the only one."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1 and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    def sum_(self, tensors: list[Tensor]):
        """Sums every tensor over the processes, in place and in one message."""
        if self.size > 1:
            flat = torch.cat([t.flatten().float() for t in tensors])
            dist.all_reduce(flat)
            for t, s in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(s.view_as(t))

    def gather(self, values: list) -> list:
        """The lists of all processes, in turn: the inverse of values[rank::size]."""
        if self.size == 1:
            return values
        parts = [None] * self.size
        dist.all_gather_object(parts, values)
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def barrier(self):
        if self.size > 1:
            dist.barrier()


def run(main):
    """Calls main with the command line; what the user can mend, a full disk included, is a sentence, no traceback."""
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
