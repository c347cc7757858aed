"""Plan formulas against the real model and its saved tensors, and communication by hand."""

import json
import subprocess
import sys

import pytest
import torch

from nanogpt import checkpoint, formatting, gpu_specs
from nanogpt.config import DataConfig, ModelConfig, resolve
from nanogpt.data import prepare
from nanogpt.errors import UserError
from nanogpt.optim import Optimizer
from nanogpt.plan import communication, corpus_cost, model_size, planner
from nanogpt.plan.model_size import StepMode, estimate_memory
from nanogpt.presets import PRESETS, preset_settings

LOCAL = gpu_specs.Cluster("local", 1e12, 16e9)
SHAPES = [
    {"arch": "gpt2", "n_layer": 3, "n_embd": 32, "context_length": 24},
    {"arch": "qwen3", "n_layer": 2, "n_embd": 48, "context_length": 24},
    {"arch": "qwen3", "n_layer": 2, "n_embd": 64, "context_length": 16, "n_kv_head": 2},
]
SHAPES = [{"n_head": 4} | shape for shape in SHAPES]
FLOAT32_SDPA = StepMode(mixed_precision=False, sdpa=True)


def make_plan(settings, vocab_size=65, cluster=LOCAL, **options):
    config = resolve(settings)
    return planner.plan(
        config.model, config.training, config.device, vocab_size, cluster, **options
    )


def count_parameters(config, vocab_size):
    model = checkpoint.build_uninitialized(config, vocab_size, "meta")
    return sum(p.numel() for p in model.parameters())


def init_model(config):
    model = checkpoint.build_uninitialized(config, 65, "cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_num_parameters_equals_the_model(shape):
    config = ModelConfig(**shape)
    assert sum(model_size.num_parameters(config, 65).values()) == count_parameters(config, 65)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt2_presets_have_published_parameters_and_twenty_tokens_for_each(preset, count):
    config = resolve(preset_settings(preset))
    assert count_parameters(config.model, 50257) == count
    assert sum(model_size.num_parameters(config.model, 50257).values()) == count
    tokens = config.training.steps * config.training.batch_size * 1024
    assert tokens / count == pytest.approx(20, rel=0.06)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_heads_of_64_channels(preset):
    config = resolve(preset_settings(preset))
    model = checkpoint.build_uninitialized(config.model, 65, "meta")
    assert model.blocks[config.model.n_layer - 1].attn.head_dim == 64
    assert config.model.context_length == (1024 if "gpt2" in preset else 256)


def test_flops_per_token_of_the_nano_preset_by_hand():
    """Count 6 per matmul parameter (blocks and head), and 12 n_layer T n_embd for attention."""
    expected = 6 * (6 * 12 * 384**2 + 65 * 384) + 12 * 6 * 256 * 384
    assert model_size.flops_per_token(ModelConfig(), 65) == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("sdpa", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_estimate_memory_equals_what_autograd_saves(shape, mixed_precision, sdpa, dropout):
    more = {"n_embd": 192, "context_length": 128, "dropout": dropout, "batch_size": 2, "steps": 1}
    config = resolve(shape | more)
    model = init_model(config.model)
    model.set_attn_implementation("sdpa" if sdpa else "eager")
    parameter_pointers = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_pointers:
            # The reference also keeps the address from being used again.
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(2, 128, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
        loss = model.loss_sum(ids, ids, torch.zeros(2, dtype=torch.int32))
    assert loss.requires_grad
    parts = estimate_memory(config.model, config.training, 65, StepMode(mixed_precision, sdpa))
    expected = parts["activations"] + parts["logits"] + parts["weights"]
    expected -= 4 * sum(p.numel() for p in model.parameters())
    assert sum(storage.nbytes() for storage in saved.values()) == pytest.approx(expected, rel=0.2)


def test_step_time_is_flops_over_speed():
    plan = make_plan({"steps": 100})
    flops = 32 * 256 * plan.flops_per_token
    assert plan.step.seconds == pytest.approx(flops / (communication.ASSUMED_MFU * 1e12))
    assert plan.seconds == pytest.approx(100 * plan.step.seconds)


def test_minutes_are_converted_to_steps():
    plan = make_plan({"minutes": 2.0})
    assert plan.seconds == pytest.approx(120, abs=plan.step.seconds)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_estimate_memory_equals_the_optimizer_state(shape, optimizer):
    config = resolve(shape | {"optimizer": optimizer, "steps": 1})
    model = init_model(config.model)
    real = Optimizer(model, config.training, model.muon_param_splits())
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model.loss_sum(ids, ids).backward()
    real.step(1.0)
    state = real.state_dict().items()
    expected = sum(tensor.nbytes for name, tensor in state if not name.endswith(".step"))
    parts = estimate_memory(config.model, config.training, 65, FLOAT32_SDPA)
    assert parts["optimizer"] == expected


@pytest.mark.parametrize(
    ("tokens", "advice"),
    [
        (10**9, "as much as new text"),
        (4 * 10**6, "each epoch teaches less"),
        (10**5, "more text"),
    ],
)
def test_notes_judge_the_number_of_epochs(tokens, advice):
    corpus = corpus_cost.estimate_corpus(tokens, "char", 65)
    assert advice in make_plan({"steps": 5000}, corpus=corpus).notes[-1]


def test_ddp_communication_by_hand():
    """A ring all-reduce sends 2 (n - 1) / n of 4 bytes per parameter over the slower link.

    It overlaps with the backward pass, two thirds of the computation (Patarasuk and Yuan 2009).
    """
    settings = {"steps": 100, "batch_size": 64}
    one, many = (
        make_plan(settings, cluster=gpu_specs.make_cluster("h-100", *devices, gigabits=1))
        for devices in ((1, 1), (8, 2))
    )
    total = sum(many.parameters.values())
    assert (one.step.bytes_sent, one.step.communication_seconds) == ({}, 0)
    assert one.step.internode_bytes == 0
    assert many.step.bytes_sent == {
        "all-reduce of gradients": pytest.approx(2 * 15 / 16 * 4 * total)
    }
    assert many.step.internode_bytes == sum(many.step.bytes_sent.values())
    gigabit = 125e6
    assert many.step.communication_seconds == pytest.approx(many.step.internode_bytes / gigabit)
    assert many.step.compute_seconds == pytest.approx(one.step.compute_seconds / 16)
    assert many.step.overlapped_seconds == pytest.approx(2 / 3 * many.step.compute_seconds)
    step = make_plan(settings, cluster=gpu_specs.make_cluster("h100", 8)).step
    # Half of NVLink's 900 GB/s are in one direction.
    assert step.communication_seconds == pytest.approx(2 * 7 / 8 * 4 * total / 450e9)
    all_but_last_bucket = step.communication_seconds * (1 - 25e6 / (4 * total))
    expected = min(2 / 3 * step.compute_seconds, all_but_last_bucket)
    assert step.overlapped_seconds == pytest.approx(expected)
    without_overlap = step.compute_seconds + step.communication_seconds
    assert step.seconds == without_overlap - step.overlapped_seconds + step.update_seconds


def test_fsdp_communication_by_hand():
    """Each micro-batch gathers the weights twice and scatters the gradients once."""
    settings = {"steps": 1, "batch_size": 64, "parallel": "fsdp", "micro_batch_size": 4}
    plan = make_plan(settings, cluster=gpu_specs.make_cluster("h100", 8))
    total, last_norm = sum(plan.parameters.values()), 2 * 384
    rest = plan.parameters["embedding"] + plan.parameters["positions"] + last_norm
    micro_batches = 2
    gathered = micro_batches * (2 * (total - rest) + rest)
    expected = {
        "all-gather of weights": 7 / 8 * 4 * gathered,
        "reduce-scatter of gradients": 7 / 8 * 4 * micro_batches * total,
    }
    assert plan.step.bytes_sent == pytest.approx(expected)


@pytest.mark.parametrize(
    ("parallel", "bytes_per_parameter"), [("ddp", 7 / 8 * 2), ("fsdp", 2 * 7 / 8 * 2 / 8)]
)
def test_muon_communication_by_hand(parallel, bytes_per_parameter):
    settings = {"steps": 1, "batch_size": 64, "optimizer": "muon", "parallel": parallel}
    plan = make_plan(settings, cluster=gpu_specs.make_cluster("h100", 8))
    muon_bytes = list(plan.step.bytes_sent.values())[-1]
    assert muon_bytes == pytest.approx(bytes_per_parameter * 6 * 12 * 384**2)


# Shards the models as the first of several ranks, and prints what it stores and sends. The fake
# process group is the only way to do so in one process.
FSDP_PROGRAM = """
import sys, json, torch, torch.distributed as dist, torch.utils._python_dispatch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from nanogpt import checkpoint
from nanogpt.config import ModelConfig
class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for name, full in (("allgather", 0), ("reduce_scatter", 1)):
            if name in operation.name():
                sent[name] = sent.get(name, 0) + args[full].nbytes
        return operation(*args, **(kwargs or {}))
for ranks in (2, 5):
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    for shape in json.loads(sys.argv[1]):
        model = checkpoint.build_uninitialized(ModelConfig(**shape), 65, "cpu")
        model.init_weights(torch.Generator().manual_seed(0))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        sent = {}
        with Counter():
            model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
        weights = sum(p.to_local().nbytes for p in model.parameters())
        gradients = sum(p.grad.to_local().nbytes for p in model.parameters())
        row_bytes = 4 * sum(p[0].numel() for p in model.parameters())
        print(json.dumps([ranks, weights, gradients, row_bytes, list(sent.values())]))
    dist.destroy_process_group()
"""


def test_estimates_equal_what_fully_shard_stores_and_sends():
    """Shards may have one more row of each parameter than the formula's even parts."""
    done = subprocess.run(
        [sys.executable, "-c", FSDP_PROGRAM, json.dumps(SHAPES)],
        check=True,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(SHAPES)
    for shape, line in zip(SHAPES * 2, lines, strict=True):
        ranks, weights, gradients, row_bytes, sent = json.loads(line)
        config = resolve(shape | {"steps": 1, "batch_size": 2 * ranks})
        mode = StepMode(mixed_precision=False, sdpa=True, world_size=ranks, parallel="fsdp")
        parts = estimate_memory(config.model, config.training, 65, mode)
        assert 0 <= weights - parts["weights"] < row_bytes
        assert gradients == weights
        assert parts["gradients"] == parts["weights"] == parts["optimizer"] / 2
        settings = shape | {"steps": 1, "batch_size": 2 * ranks, "parallel": "fsdp"}
        plan = make_plan(settings, cluster=gpu_specs.make_cluster("h100", ranks))
        for full, expected in zip(sent, plan.step.bytes_sent.values(), strict=True):
            assert 0 <= full * (ranks - 1) / ranks - expected <= 2 * ranks * row_bytes


def test_estimate_memory_of_what_fsdp_does_not_shard():
    """Without checkpointing, the backward pass keeps 16-bit weights; gradients stay sharded."""
    config = resolve({"steps": 1, "batch_size": 64})
    total = sum(model_size.num_parameters(config.model, 65).values())
    mode = StepMode(mixed_precision=True, sdpa=True, world_size=8, parallel="fsdp")

    def memory(micro_batch_size, checkpointing):
        update = {"micro_batch_size": micro_batch_size, "activation_checkpointing": checkpointing}
        training = config.training.model_copy(update=update)
        return estimate_memory(config.model, training, 65, mode)

    assert memory(8, True)["gradients"] == memory(4, True)["gradients"] == total / 2
    kept = memory(8, False)["weights"] - memory(8, True)["weights"]
    assert kept == 2 * 6 * 12 * 384**2
    block = (total - 65 * 384 - 256 * 384 - 2 * 384) // 6
    rest = total - 6 * block
    assert memory(8, True)["buffers"] == 4 * (2 * block + rest) + 2 * block + 8 * block


LAYERS_12 = {"n_layer": 12, "n_embd": 768, "activation_checkpointing": False}
LAYERS_48 = {"n_layer": 48, "n_head": 16, "n_embd": 2048}
LAYERS_80 = {"n_layer": 80, "n_head": 64, "n_embd": 8192}
LAYERS_2 = {"n_layer": 2, "n_head": 64, "n_embd": 65536}


@pytest.mark.parametrize(
    ("settings", "gpus", "fix"),
    [
        (
            LAYERS_12 | {"batch_size": 64, "micro_batch_size": 64},
            ("t4",),
            {"micro_batch_size": 8},
        ),
        (
            LAYERS_12 | {"batch_size": 1, "context_length": 32768},
            ("t4",),
            {"activation_checkpointing": True},
        ),
        (LAYERS_48 | {"batch_size": 8}, ("a10", 8), {"parallel": "fsdp"}),
        (
            LAYERS_48 | {"batch_size": 1},
            ("a10",),
            {"gpus_per_node": 4, "batch_size": 4, "parallel": "fsdp"},
        ),
        (
            LAYERS_80 | {"batch_size": 8},
            ("h100", 8),
            {"nodes": 4, "batch_size": 32, "parallel": "fsdp"},
        ),
        (LAYERS_2 | {"batch_size": 8}, ("t4", 8), None),
    ],
)
def test_fix_is_the_smallest_change_that_fits(settings, gpus, fix):
    base = {"arch": "qwen3", "steps": 1, "context_length": 1024, "dropout": 0.0}
    plan = make_plan(base | settings, 32768, gpu_specs.make_cluster(*gpus))
    assert not plan.fits
    assert plan.fix == fix


def test_fix_fits_and_half_of_its_nodes_do_not():
    settings = {
        "arch": "qwen3",
        "n_layer": 80,
        "n_head": 64,
        "n_embd": 8192,
        "steps": 1,
        "batch_size": 64,
        "parallel": "fsdp",
        "context_length": 4096,
    }

    def plan_nodes(nodes, **more):
        return make_plan(settings | more, 32768, gpu_specs.make_cluster("a100", 8, nodes))

    nodes = plan_nodes(1).fix["nodes"]
    assert plan_nodes(nodes, batch_size=8 * nodes).fits
    assert not plan_nodes(nodes // 2).fits


def test_estimate_corpus_by_hand():
    corpus = corpus_cost.estimate_corpus(10**13, "bpe", 32_768, machines=8)
    assert corpus.shards == 4096
    assert corpus.disk_bytes == 2 * corpus.tokens
    assert corpus.shard_bytes == 2 * -(-corpus.tokens // 4096)
    assert corpus.tokens == pytest.approx(10**13 / 4.1)
    assert corpus.reading_hours == pytest.approx((2 * 10**13 / 380e6 + 35) / 3600)
    assert corpus.encoding_hours == pytest.approx(10**13 / (64 * 2.6e6) / 3600)
    assert corpus_cost.estimate_corpus(100, "byte", 257).shards == 1


def test_estimate_corpus_equals_a_prepared_text(tmp_path):
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n" * 100, encoding="utf-8")
    prepared = prepare.prepare_folder(
        [str(tmp_path / "text.txt")], DataConfig(tokenizer="byte"), tmp_path / "out"
    )
    corpus = corpus_cost.estimate_corpus(2400, "byte", prepared.tokenizer.vocab_size)
    assert corpus.tokens == len(prepared.train) + len(prepared.val)
    shards = (tmp_path / "out").glob("*.bin")
    assert corpus.disk_bytes == sum(path.stat().st_size for path in shards)


def test_make_cluster_suggests_similar_names_for_an_unknown_gpu():
    with pytest.raises(UserError, match=r"no GPU 'H10'.* Did you mean h100"):
        gpu_specs.make_cluster("H10")


def test_plan_requires_a_divisible_batch_size():
    with pytest.raises(
        UserError, match="batch size 32 is not divisible by the number of devices, 3"
    ) as error:
        make_plan({"steps": 1}, cluster=gpu_specs.make_cluster("h100", 3))
    assert error.value.fix == {"batch_size": 33}


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.000123456, "0.000123"), (1.5, "1.50"), (123.4, "123"), (98_765.0, "98,800"), (0.0, "0")],
)
def test_format_sig_keeps_three_digits(number, text):
    assert formatting.format_sig(number) == text


def test_format_flags():
    settings = {"nodes": 4, "activation_checkpointing": True, "compile": False}
    assert formatting.format_flags(settings) == (
        "--nodes 4 --activation-checkpointing --no-compile"
    )


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others():
    settings = {"n_layer": 8, "context_length": 128, "dropout": 0.2, "batch_size": 4, "steps": 1}
    config = resolve(SHAPES[0] | settings)
    deep, one = (config.model.model_copy(update={"n_layer": layers}) for layers in (8, 1))
    mode, tokens = StepMode(mixed_precision=False, sdpa=False), 4 * 128
    checkpointed = config.training.model_copy(update={"activation_checkpointing": True})
    difference = (
        estimate_memory(deep, checkpointed, 65, mode)["activations"]
        - estimate_memory(one, config.training, 65, mode)["activations"]
    )
    assert difference == 8 * tokens * 4 * deep.n_embd


def test_fit_micro_batch_halves_the_batch_and_then_checkpoints_activations():
    config = resolve({"n_layer": 8, "steps": 1, "batch_size": 24})

    def needed(size, checkpointing=False):
        update = {"micro_batch_size": size, "activation_checkpointing": checkpointing}
        training = config.training.model_copy(update=update)
        return 1.2 * sum(estimate_memory(config.model, training, 65, FLOAT32_SDPA).values())

    def fit(budget_bytes, **settings):
        training = config.training.model_copy(update=settings)
        chosen, _ = model_size.fit_micro_batch(
            config.model, training, 65, 24, budget_bytes, FLOAT32_SDPA
        )
        return chosen.micro_batch_size, chosen.activation_checkpointing

    assert fit(None) == fit(needed(24)) == (24, False)
    assert fit(needed(24) - 1) == fit(needed(12)) == (12, False)
    assert [fit(needed(size)) for size in (6, 3, 2, 1)] == [
        (6, False),
        (3, False),
        (2, False),
        (1, False),
    ]
    assert needed(1, True) < needed(1)
    sizes = (24, 12, 6, 3, 2, 1)
    expected = next(size for size in sizes if needed(size, True) < needed(1))
    assert fit(needed(1) - 1) == (expected, True)
    assert fit(0) == (1, True)
    assert fit(needed(2), micro_batch_size=6) == (6, True)
    assert fit(0, micro_batch_size=6, activation_checkpointing=False) == (6, False)
    assert fit(None, micro_batch_size=99) == (24, False)


@pytest.mark.parametrize(
    "settings",
    [
        {"arch": "qwen3", "dropout": 0.0},
        {"arch": "qwen3", "dropout": 0.0, "sliding_window": 100},
        {"dropout": 0.2},
    ],
)
def test_estimate_memory_is_linear_in_context_length(settings):
    short, long = (
        resolve(settings | {"context_length": T, "batch_size": 1, "steps": 1})
        for T in (8192, 16384)
    )
    short_bytes, long_bytes = (
        sum(estimate_memory(c.model, c.training, 65, FLOAT32_SDPA).values()) for c in (short, long)
    )
    fixed = 16 * sum(model_size.num_parameters(long.model, 65).values())
    assert (long_bytes - fixed) / (short_bytes - fixed) < 2.1
