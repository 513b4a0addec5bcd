"""Costs that are modelled and not measured: an analytic roofline (Williams et al., CACM 52, 2009) of every variant.

A forward pass of a subblock takes, on each of `tensor_parallel` devices,

    max(product FLOPs / compute, weights / bandwidth)                       its matrices
    + (hidden states + inner states) / bandwidth                            norm, activation: kernels of their own
    + max(score FLOPs / compute, KV cache / bandwidth)                      an attention's scores
    + kernels x floor                                                       launches
    + 2 (n - 1) / n x hidden states / interconnect + 2 x floor              all-reduce of n > 1 devices

with the achievable rates of a hardware target (profiles/hardware.py). Prefill sees half of the prompt on average, a
decode step the prompt and half of the generation. Of experts those are read that a token of the pass is sent to, as if
the router sent tokens to all of them alike. Element-wise kernels wait for the products before them, so their
bytes are added, not hidden behind FLOPs: hidden states pass memory four times a subblock (norm and residual add are one
kernel), on every device whole; a gated FFN's inner states three times (gate and up in, their product out), split over
the devices, in one more launch. Under float8 embedding, head, scores and hidden states stay
in 16 bits, as engines keep them. Weights and KV heads are split over the devices, a KV head is never cut: fewer heads
than devices are copied. Not modelled: paging, scheduling, sampling, quantisation kernels, power limits, overlap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from blocks.attention.ssd import CHUNK
from blocks.families import head_dim, inner_channels, tokens_seen, windows_of
from blocks.kinds import kind_of, parse_labels
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, Cost, CostTable, NonBlockCost
from blocks.resources import BYTES, non_block_parameters, resources, weight_bytes
from blocks.variant import Variant
from profiles.hardware import HardwareTarget, check_use
from profiles.schema import Hardware, KvPrecision, Precision, Scenario, SearchSpace
from tasks.inputs.precision import cache_precision, served_precision

HIDDEN_PASSES = 4  # hidden states through memory per subblock: norm in and out, core in and out
INNER_PASSES = 3  # an FFN's inner states through memory: gate and up read, the activated product written
COLLECTIVE_FLOORS = 2  # latency of an all-reduce, in kernel floors: reduce, then spread


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A hardware target, and how a model is placed on it. held: precision of weights in memory, if another.

    kind: GGUF's type of number that weights are stored in and read as, where it is another; products keep their rate.
    """

    target: HardwareTarget
    precision: Precision
    kv_precision: KvPrecision
    held: Precision | None = None
    kind: str = ""
    devices: int = 1

    @property
    def half(self) -> Precision:
        """Precision of what is not quantised: embedding, head, scores, hidden states."""
        return "bfloat16" if self.precision in ("float8", "q8_0") else self.precision

    @property
    def floor(self) -> float:
        """Seconds of the shortest kernel."""
        return self.target.kernel_floor_microseconds * 1e-6

    def compute(self, flops: float, precision: Precision) -> float:
        """Seconds of so many FLOPs, shared by all devices."""
        return flops / self.devices / self.target.flops_per_second(precision)

    def memory(self, bytes_per_device: float) -> float:
        """Seconds of so many bytes through the memory of each device."""
        return bytes_per_device / self.target.bytes_per_second

    def all_reduce(self, size: float) -> float:
        """Seconds to sum `size` bytes of every device and leave the sum on each (ring)."""
        if self.devices == 1:
            return 0.0
        rate = (self.target.interconnect_gb_per_second or 0.0) * 1e9 * self.target.achievable_interconnect
        return 2 * (self.devices - 1) / self.devices * size / rate + COLLECTIVE_FLOORS * self.floor


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward: so many new tokens of each sequence, each of which sees `context` tokens on average."""

    sequences: int
    tokens: int
    context: int

    @property
    def count(self) -> int:
        """All new tokens."""
        return self.sequences * self.tokens


def setting_of(hardware: Hardware, target: HardwareTarget, parent: Parent | None = None) -> Setting:
    """How a profile's hardware section uses a target. Raises ProfileError when the target cannot be used like that.

    parent: where the profile names no precision, weights and KV cache have the parent's; a modelled target that has
    this precision computes in it too.
    """
    check_use(target, hardware)
    served = hardware.precision if parent is None else served_precision(hardware, parent)
    modelled = hardware.engine == "roofline" and served in target.peak_tflops
    precision = served if modelled else hardware.precision
    return Setting(
        target=target,
        precision=precision,
        kv_precision=cache_precision(hardware, precision),
        devices=hardware.tensor_parallel,
        held=None if served == precision or hardware.engine == "roofline" else served,
    )


def held(setting: Setting) -> Setting:
    """The setting for counting memory: another than for times where weights are held in another precision."""
    if setting.held is None:
        return setting
    kept = setting.held if setting.kv_precision == setting.precision else setting.kv_precision
    return replace(setting, precision=setting.held, kv_precision=kept, held=None)


def prefill_of(scenario: Scenario, batch: int) -> Pass:
    """The whole prompt at once."""
    return Pass(sequences=batch, tokens=scenario.prompt_tokens, context=(scenario.prompt_tokens + 1) // 2)


def decode_of(scenario: Scenario, batch: int) -> Pass:
    """The average decode step: the one in the middle of the generation."""
    return Pass(sequences=batch, tokens=1, context=scenario.prompt_tokens + scenario.generated_tokens // 2)


def subblock_seconds(parent: Parent, variant: Variant, work: Pass, setting: Setting) -> float:
    """Modelled seconds of one subblock; 0 for a no-op."""
    needs = resources(parent, variant, work.context, weight_bytes(setting.kind or setting.precision))
    if not needs.kernels:
        return 0.0
    products = kind_of(variant).flops_per_token(variant, parent.config, 0)
    hidden = work.count * parent.config.hidden_size * BYTES[setting.half]
    channels = inner_channels(kind_of(variant).block_entry(variant, parent.config))
    inner = work.count * channels * BYTES[setting.half]
    matrices = max(
        setting.compute(products * work.count, setting.precision),
        setting.memory(needs.bytes_read(work.count) / setting.devices),
    )
    elementwise = setting.memory(HIDDEN_PASSES * hidden + INNER_PASSES * inner / setting.devices)
    kernels = needs.kernels + (1 if inner else 0)
    # a prefill reads back what it has just written
    seen = (
        work.tokens
        if work.tokens > 1
        else tokens_seen(parent.config, work.context, kind_of(variant).kv_tokens(variant))
    )
    scores = max(
        setting.compute((needs.flops_per_token - products) * work.count, setting.half),
        setting.memory(
            work.sequences * (seen + work.tokens) * kv_bytes_per_device(parent, variant, setting)
            # read and written once for a chunk of tokens
            + work.sequences * 2 * -(-work.tokens // CHUNK) * state_bytes_per_device(parent, variant, setting)
        ),
    )
    return matrices + elementwise + scores + kernels * setting.floor + setting.all_reduce(hidden)


def kv_bytes_per_device(parent: Parent, variant: Variant, setting: Setting) -> int:
    """KV cache bytes of one token on each device; a KV head is not cut."""
    channels = head_dim(parent.config)
    heads = kind_of(variant).kv_elements_per_token(variant, parent.config) // (2 * channels)
    return math.ceil(-(-heads // setting.devices) * 2 * channels * weight_bytes(setting.kv_precision))


def state_bytes_per_device(parent: Parent, variant: Variant, setting: Setting) -> int:
    """Bytes of a sequence's state on each device."""
    state = kind_of(variant).state_bytes(variant, parent.config, weight_bytes(setting.kv_precision))
    return -(-state // setting.devices)


def non_block_seconds(parent: Parent, work: Pass, setting: Setting) -> float:
    """Modelled seconds of the embedding of all tokens, final norm and head of each sequence's last."""
    size, width, vocabulary = BYTES[setting.half], parent.config.hidden_size, parent.config.vocab_size
    table = vocabulary * width * weight_bytes(setting.kind or setting.half)
    embedding = setting.memory(2 * work.count * width * size) + setting.floor
    head = max(
        setting.compute(2 * vocabulary * width * work.sequences, setting.half),
        setting.memory((table + work.sequences * vocabulary * size) / setting.devices),
    )
    return embedding + head + 2 * setting.floor + setting.all_reduce(work.sequences * vocabulary * size / 2)


def modelled_costs(parent: Parent, space: SearchSpace, scenarios: Sequence[Scenario], setting: Setting) -> CostTable:
    """The cost table of a parent, modelled from its config alone.

    Memory is that of one device: `weight_bytes` and `kv_bytes_per_token` are what each of them holds; parameters are
    the model's.
    """
    variants = [variant for part in SUBBLOCKS for variant in parse_labels(part, getattr(space, part), parent.config)]
    shapes = [(scenario, batch) for scenario in scenarios for batch in scenario.batch_sizes]
    return CostTable(
        hardware=described(setting),
        costs=tuple(_cost(parent, variant, *shape, setting) for shape in shapes for variant in variants),
        non_block=tuple(_non_block(parent, *shape, setting) for shape in shapes),
        num_hidden_layers=parent.depth,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        windows=windows_of(parent.config),
    )


def described(setting: Setting) -> dict[str, str]:
    """What the figures hold for. It says that they are modelled."""
    target = setting.target
    return {
        "name": target.name,
        "engine": "roofline",
        "costs": "modelled, not measured",
        "device": target.description,
        "precision": setting.precision,
        "kv_precision": setting.kv_precision,
        "tensor_parallel": str(setting.devices),
        "memory": "of one device",
        "rates": f"{target.flops_per_second(setting.precision) / 1e12:.4g} TFLOP/s, "
        f"{target.bytes_per_second / 1e9:.4g} GB/s, floor {target.kernel_floor_microseconds:g} us",
    }


def _cost(parent: Parent, variant: Variant, scenario: Scenario, batch: int, setting: Setting) -> Cost:
    needs = resources(parent, variant, scenario.prompt_tokens, weight_bytes(setting.kind or held(setting).precision))
    return Cost(
        subblock=variant.subblock,
        variant=variant.label,
        scenario=scenario.name,
        batch_size=batch,
        prefill_seconds=subblock_seconds(parent, variant, prefill_of(scenario, batch), setting),
        decode_seconds_per_token=subblock_seconds(parent, variant, decode_of(scenario, batch), setting),
        prefill_spread=0.0,
        decode_spread=0.0,
        parameters=needs.parameters,
        weight_bytes=-(-needs.weight_bytes // setting.devices),
        kv_bytes_per_token=kv_bytes_per_device(parent, variant, held(setting)),
        kv_tokens=kind_of(variant).kv_tokens(variant),
        state_bytes=state_bytes_per_device(parent, variant, held(setting)),
    )


def _non_block(parent: Parent, scenario: Scenario, batch: int, setting: Setting) -> NonBlockCost:
    parameters = non_block_parameters(parent.config)
    return NonBlockCost(
        scenario=scenario.name,
        batch_size=batch,
        prefill_seconds=non_block_seconds(parent, prefill_of(scenario, batch), setting),
        decode_seconds_per_token=non_block_seconds(parent, decode_of(scenario, batch), setting),
        parameters=parameters,
        weight_bytes=math.ceil(parameters * weight_bytes(setting.kind or held(setting).half) / setting.devices),
    )
