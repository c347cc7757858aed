"""The plan's formulas are those of the real network, its parameters and what its backward pass keeps, and of what passes between devices, by hand."""

import json
import subprocess
import sys

import pytest
import torch

from nanogpt import checkpoint, plan, prepare
from nanogpt.config import PRESETS, ModelConfig, TextConfig, preset_settings, resolve
from nanogpt.errors import UserError
from nanogpt.optim import Optimizer

HERE = plan.Cluster("here", 1e12, 16e9)
SHAPES = [
    {"arch": "classic", "n_layer": 3, "n_head": 4, "n_embd": 32, "context_length": 24},
    {"arch": "modern", "n_layer": 2, "n_head": 4, "n_embd": 48, "context_length": 24},
    {"arch": "modern", "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "context_length": 16},
]


def foresee(settings, vocab_size=65, cluster=HERE, **more):
    config = resolve(settings)
    return plan.plan(config.model, config.training, config.machine, vocab_size, cluster, **more)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_network(shape):
    config = ModelConfig(**shape)
    assert sum(plan.parameters(config, 65).values()) == sum(p.numel() for p in checkpoint.empty_model(config, 65, "meta").parameters())


@pytest.mark.parametrize(("preset", "count"), [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_gpt2_has_as_many_parameters_as_was_published_and_twenty_tokens_for_each(preset, count):
    config = resolve(preset_settings(preset))
    assert sum(p.numel() for p in checkpoint.empty_model(config.model, 50257, "meta").parameters()) == count
    assert sum(plan.parameters(config.model, 50257).values()) == count
    assert config.training.steps * config.training.batch_size * 1024 / count == pytest.approx(20, rel=0.06)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_whole(preset):
    config = resolve(preset_settings(preset))
    assert checkpoint.empty_model(config.model, 65, "meta").blocks[config.model.n_layer - 1].attn.head_dim == 64
    assert config.model.context_length == (1024 if "gpt2" in preset else 256)


def test_flops_of_the_seeds_recipe_by_hand():
    """6 for each of the 6 x 12 x 384^2 numbers in the matrices of the blocks and the 65 x 384 of the head, and 12 x 6 x 256 x 384 for attention."""
    assert plan.flops_per_token(ModelConfig(), 65) == 6 * (6 * 12 * 384**2 + 65 * 384) + 12 * 6 * 256 * 384


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_memory_is_what_the_backward_pass_keeps(shape, half, fused, dropout):
    config = resolve(shape | {"n_embd": 192, "context_length": 128, "dropout": dropout, "batch_size": 2, "steps": 1})
    model = checkpoint.empty_model(config.model, 65, "cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    model.fuse_attention(fused)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # which also keeps its address from being used again
        return tensor

    ids = torch.zeros(2, 128, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model.nats(ids, ids, torch.zeros(2, dtype=torch.int32))
    assert loss.requires_grad
    parts = plan.memory(config.model, config.training, 65, 2, half=half, fused=fused)
    expected = parts["activations"] + parts["logits"] + parts["weights"] - 4 * sum(p.numel() for p in model.parameters())
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(expected, rel=0.2)


def test_time_is_arithmetic_over_speed():
    made = foresee({"steps": 100})
    assert made.step.seconds == pytest.approx(32 * 256 * made.flops_per_token / (plan.SHARE * 1e12))
    assert made.seconds == pytest.approx(100 * made.step.seconds)


def test_minutes_are_turned_into_steps():
    made = foresee({"minutes": 2.0})
    assert made.seconds == pytest.approx(120, abs=made.step.seconds)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_optimizers_memory_is_that_of_its_state(shape, optimizer):
    config = resolve(shape | {"optimizer": optimizer, "steps": 1})
    model = checkpoint.empty_model(config.model, 65, "cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    real = Optimizer(model, config.training, model.matrices())
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model.nats(ids, ids).backward()
    real.step(1.0)
    kept = sum(tensor.nbytes for name, tensor in real.state_tensors().items() if not name.endswith(".step"))
    assert plan.memory(config.model, config.training, 65, 1, half=False, fused=True)["optimizer"] == kept


@pytest.mark.parametrize(("tokens", "advice"), [(10**9, "as good as new text"), (4 * 10**6, "each reading teaches less"), (10**5, "more text")])
def test_how_often_a_text_is_read_is_judged(tokens, advice):
    assert advice in foresee({"steps": 5000}, corpus=plan.corpus_of(tokens, "char", 65)).hints[-1]


def test_a_ring_passes_gradients_round_twice_and_the_backward_pass_hides_what_it_can():
    """By hand: 2 (n - 1) / n of 4 bytes a parameter (Patarasuk and Yuan 2009), over the slower way; two thirds of the arithmetic is backward."""
    one, many = (foresee({"steps": 100, "batch_size": 64}, cluster=plan.cluster_of("h-100", *devices, gigabits=1)) for devices in ((1, 1), (8, 2)))
    total = sum(many.parameters.values())
    assert (one.step.communication, one.step.exchange_seconds, one.step.between_nodes) == ({}, 0, 0)
    assert many.step.communication == {"all-reduce of gradients": pytest.approx(2 * 15 / 16 * 4 * total)}
    assert many.step.between_nodes == sum(many.step.communication.values())
    assert many.step.exchange_seconds == pytest.approx(many.step.between_nodes / 125e6)  # a gigabit
    assert many.step.compute_seconds == pytest.approx(one.step.compute_seconds / 16)
    assert many.step.hidden_seconds == pytest.approx(2 / 3 * many.step.compute_seconds)
    within = foresee({"steps": 100, "batch_size": 64}, cluster=plan.cluster_of("h100", 8)).step
    assert within.exchange_seconds == pytest.approx(2 * 7 / 8 * 4 * total / 450e9)  # half of NVLink's 900 GB/s go one way
    assert within.hidden_seconds == pytest.approx(min(2 / 3 * within.compute_seconds, within.exchange_seconds * (1 - 25e6 / (4 * total))))
    assert within.seconds == within.compute_seconds + within.exchange_seconds - within.hidden_seconds + within.update_seconds


def test_fsdp_gathers_weights_twice_for_each_part_of_a_batch_and_scatters_gradients_once():
    settings = {"steps": 1, "batch_size": 64, "parallel": "fsdp", "micro_batch_size": 4}
    made = foresee(settings, cluster=plan.cluster_of("h100", 8))
    total, rest = sum(made.parameters.values()), made.parameters["embedding"] + made.parameters["positions"] + 2 * 384  # of the last norm
    gathered = 2 * (2 * (total - rest) + rest)  # eight windows on each device, four at a time
    expected = {"all-gather of weights": 7 / 8 * 4 * gathered, "reduce-scatter of gradients": 7 / 8 * 4 * 2 * total}
    assert made.step.communication == pytest.approx(expected)


def test_muon_gives_each_matrix_to_one_device():
    for parallel, each in (("ddp", 7 / 8 * 2), ("fsdp", 2 * 7 / 8 * 2 / 8)):
        made = foresee({"steps": 1, "batch_size": 64, "optimizer": "muon", "parallel": parallel}, cluster=plan.cluster_of("h100", 8))
        assert list(made.step.communication.values())[-1] == pytest.approx(each * 6 * 12 * 384**2)


def test_a_share_of_fsdp_is_what_fully_shard_keeps_and_sends():
    """Measured in a process that takes itself for the first of several; shares differ by a row of each parameter where they do not come out even."""
    code = """
import sys, json, torch, torch.distributed as dist, torch.utils._python_dispatch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from nanogpt import checkpoint
from nanogpt.config import ModelConfig
class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for name, whole in (("allgather", 0), ("reduce_scatter", 1)):
            if name in operation.name():
                sent[name] = sent.get(name, 0) + args[whole].nbytes
        return operation(*args, **(kwargs or {}))
for ranks in (2, 5):
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    for shape in json.loads(sys.argv[1]):
        model = checkpoint.empty_model(ModelConfig(**shape), 65, "cpu")
        model.init_weights(torch.Generator().manual_seed(0))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        sent = {}
        with Counting():
            model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
        weights, gradients = (sum(part.to_local().nbytes for part in parts) for parts in zip(*((p, p.grad) for p in model.parameters())))
        print(json.dumps([ranks, weights, gradients, 4 * sum(p[0].numel() for p in model.parameters()), list(sent.values())]))
    dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(SHAPES)], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(SHAPES)
    for shape, (ranks, weights, gradients, uneven, sent) in zip(SHAPES * 2, map(json.loads, lines), strict=True):
        config = resolve(shape | {"steps": 1, "batch_size": 2 * ranks})
        parts = plan.memory(config.model, config.training, 65, 2, half=False, fused=True, ranks=ranks, parallel="fsdp")
        assert 0 <= weights - parts["weights"] < uneven
        assert gradients == weights
        assert parts["gradients"] == parts["weights"] == parts["optimizer"] / 2
        communication = foresee(shape | {"steps": 1, "batch_size": 2 * ranks, "parallel": "fsdp"}, cluster=plan.cluster_of("h100", ranks)).step.communication
        for whole, expected in zip(sent, communication.values(), strict=True):
            assert 0 <= whole * (ranks - 1) / ranks - expected <= 2 * ranks * uneven


def test_fsdp_keeps_some_things_whole():
    """With kept activations the weights in 16 bits, which the backward pass multiplies with; not gradients that wait for more windows of the step."""
    config = resolve({"steps": 1, "batch_size": 64})
    total = sum(plan.parameters(config.model, 65).values())

    def parts(rows, checkpoints):
        training = config.training.model_copy(update={"checkpoint_activations": checkpoints})
        return plan.memory(config.model, training, 65, rows, half=True, fused=True, ranks=8, parallel="fsdp")

    assert (parts(8, True)["gradients"], parts(4, True)["gradients"]) == (total / 2, total / 2)
    assert parts(8, False)["weights"] - parts(8, True)["weights"] == 2 * 6 * 12 * 384**2
    block = (total - 65 * 384 - 256 * 384 - 2 * 384) // 6
    assert parts(8, True)["buffers"] == 4 * (2 * block + (total - 6 * block)) + 2 * block + 8 * block


@pytest.mark.parametrize(
    ("settings", "where", "remedy"),
    [
        ({"n_layer": 12, "n_embd": 768, "batch_size": 64, "micro_batch_size": 64, "checkpoint_activations": False}, ("t4",), "--micro-batch-size 8"),
        ({"n_layer": 12, "n_embd": 768, "batch_size": 1, "context_length": 32768, "checkpoint_activations": False}, ("t4",), "--checkpoint-activations"),
        ({"n_layer": 48, "n_head": 16, "n_embd": 2048, "batch_size": 8}, ("a10", 8), "--parallel fsdp"),
        ({"n_layer": 48, "n_head": 16, "n_embd": 2048, "batch_size": 1}, ("a10",), "--gpus-per-node 4 --batch-size 4 --parallel fsdp"),
        ({"n_layer": 80, "n_head": 64, "n_embd": 8192, "batch_size": 8}, ("h100", 8), "--nodes 4 --batch-size 32 --parallel fsdp"),
        ({"n_layer": 2, "n_head": 64, "n_embd": 65536, "batch_size": 8}, ("t4", 8), None),
    ],
)
def test_what_does_not_fit_is_answered_with_the_smallest_change(settings, where, remedy):
    base = {"arch": "modern", "steps": 1, "context_length": 1024, "dropout": 0.0}
    made = foresee(base | settings, 32768, plan.cluster_of(*where))
    assert not made.fits
    assert made.remedy == remedy


def test_what_a_plan_advises_fits_and_half_of_the_devices_would_not():
    settings = {"arch": "modern", "n_layer": 80, "n_head": 64, "n_embd": 8192, "steps": 1, "batch_size": 64, "parallel": "fsdp", "context_length": 4096}
    nodes = int(foresee(settings, 32768, plan.cluster_of("a100", 8)).remedy.split()[1])
    assert foresee(settings | {"batch_size": 8 * nodes}, 32768, plan.cluster_of("a100", 8, nodes)).fits
    assert not foresee(settings, 32768, plan.cluster_of("a100", 8, nodes // 2)).fits


def test_a_corpus_is_counted_by_hand():
    made = plan.corpus_of(10**13, "bpe", 32_768, machines=8)
    assert (made.shards, made.disk_bytes, made.shard_bytes) == (4096, 2 * made.tokens, 2 * -(-made.tokens // 4096))
    assert made.tokens == pytest.approx(10**13 / 4.1)
    assert made.reading_hours == pytest.approx((2 * 10**13 / 380e6 + 35) / 3600)
    assert made.encoding_hours == pytest.approx(10**13 / (64 * 2.6e6) / 3600)
    assert plan.corpus_of(100, "byte", 257).shards == 1


def test_a_corpus_is_that_of_a_text_that_was_prepared(tmp_path):
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n" * 100, encoding="utf-8")
    done = prepare.prepare_folder([str(tmp_path / "text.txt")], TextConfig(tokenizer="byte"), tmp_path / "out")
    made = plan.corpus_of(2400, "byte", done.tokenizer.vocab_size)
    assert (made.tokens, made.disk_bytes) == (len(done.train) + len(done.val), sum(path.stat().st_size for path in (tmp_path / "out").glob("*.bin")))


def test_an_unknown_gpu_is_answered_with_those_like_it():
    with pytest.raises(UserError, match=r"no GPU 'H10'.* Did you mean h100"):
        plan.cluster_of("H10")


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match=r"32 windows cannot be shared among 3 devices.\n.*--batch-size 33"):
        foresee({"steps": 1}, cluster=plan.cluster_of("h100", 3))


@pytest.mark.parametrize(("number", "text"), [(0.000123456, "0.000123"), (1.5, "1.50"), (123.4, "123"), (98_765.0, "98,800"), (0.0, "0")])
def test_numbers_keep_three_digits(number, text):
    assert plan.rounded(number) == text


def test_checkpointed_activations_leave_one_layer_and_what_goes_into_the_others():
    config = resolve(SHAPES[0] | {"n_layer": 8, "context_length": 128, "dropout": 0.2, "steps": 1})
    deep, one = (config.model.model_copy(update={"n_layer": layers}) for layers in (8, 1))
    how, tokens = {"half": False, "fused": False}, 4 * 128
    checkpointed = config.training.model_copy(update={"checkpoint_activations": True})
    kept = plan.memory(deep, checkpointed, 65, 4, **how)["activations"] - plan.memory(one, config.training, 65, 4, **how)["activations"]
    assert kept == 8 * tokens * 4 * deep.n_embd


def test_a_batch_is_halved_until_it_fits_and_then_activations_are_checkpointed():
    config = resolve({"n_layer": 8, "steps": 1, "batch_size": 24})
    how = {"half": False, "fused": True}

    def needed(rows, checkpoints=False):
        training = config.training.model_copy(update={"checkpoint_activations": checkpoints})
        return 1.2 * sum(plan.memory(config.model, training, 65, rows, **how).values())

    def chosen(room, **given):
        found, _ = plan.fit(config.model, config.training.model_copy(update=given), 65, 24, room, **how)
        return found.micro_batch_size, found.checkpoint_activations

    assert chosen(None) == chosen(needed(24)) == (24, False)
    assert chosen(needed(24) - 1) == chosen(needed(12)) == (12, False)
    assert [chosen(needed(rows)) for rows in (6, 3, 2, 1)] == [(6, False), (3, False), (2, False), (1, False)]
    assert needed(1, True) < needed(1)
    assert chosen(needed(1) - 1) == (next(rows for rows in (24, 12, 6, 3, 2, 1) if needed(rows, True) < needed(1)), True)
    assert chosen(0) == (1, True)
    assert chosen(needed(2), micro_batch_size=6) == (6, True)
    assert chosen(0, micro_batch_size=6, checkpoint_activations=False) == (6, False)
    assert chosen(None, micro_batch_size=99) == (24, False)


def test_long_contexts_take_memory_in_proportion():
    for more in ({"arch": "modern", "dropout": 0.0}, {"arch": "modern", "dropout": 0.0, "window": 100}, {"dropout": 0.2}):
        near, far = (resolve(more | {"context_length": T, "batch_size": 1, "steps": 1}) for T in (8192, 16384))
        sizes = [sum(plan.memory(c.model, c.training, 65, 1, half=False, fused=True).values()) for c in (near, far)]
        fixed = 16 * sum(plan.parameters(far.model, 65).values())
        assert (sizes[1] - fixed) / (sizes[0] - fixed) < 2.1
