"""Inspection equals a direct computation from the weights; its HTML escapes all text."""

import base64
import json
import math
import re
import threading
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import TINY, run

import nanogpt
from nanogpt.errors import UserError
from nanogpt.evaluate import TextSize, evaluate
from nanogpt.inspection import inspector as inspector_module
from nanogpt.inspection.inspector import Inspector, forward_pre_hooks, token_texts
from nanogpt.render import inspection_html, inspection_terminal
from nanogpt.tokenizer.tokenizer import train_tokenizer

TEXT = "The cat — die Katze — 猫 saw the dög. 🙂 the cat saw; the dog saw the cat.\n" * 3
SHAPES = [
    {},
    {"arch": "qwen3"},
    {"arch": "qwen3", "n_head": 4, "n_kv_head": 2, "sliding_window": 3},
]
HOSTILE_TEXT = "<script>alert('x')</script> & \"quotes\" \x1b[31m\x00 a"


@pytest.fixture(scope="module", params=["char", "byte", "word", "bpe"])
def tokenizer(request):
    return train_tokenizer(request.param, [TEXT], {"word": 280, "bpe": 285}.get(request.param))


@pytest.fixture(scope="module")
def byte():
    return train_tokenizer("byte", [])


@pytest.fixture
def trained(story, tmp_path):
    settings = TINY | {"steps": 4, "eval_every": 2, "dropout": 0.0}
    return nanogpt.train(story, tmp_path / "run", **settings)


def inspect(model, tokenizer, machine, text="", start_token=10, unseen=(), held_out=None):
    """Return an inspector of a model without a run."""
    return Inspector(
        text, model, tokenizer, machine, start_token, unseen, None, lambda: held_out, None
    )


@torch.no_grad()
def expected_bits(model, ids: list[int], T: int) -> list[float]:
    """Return the bits of each id after the first, computed one at a time in windows of T."""
    bits = []
    for i in range(1, len(ids)):
        start = (i - 1) // T * T
        logits = model(torch.tensor([ids[start:i]]))[0, -1].double()
        bits.append(-logits.log_softmax(dim=0)[ids[i]].item() / math.log(2))
    return bits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", [TEXT, TEXT[:7], "a"])
def test_surprisal_equals_the_loss(make_model, tokenizer, machine, shape, text):
    model, start = make_model(tokenizer.vocab_size, **shape), tokenizer.encode("\n")[0]
    result = inspect(model, tokenizer, machine, text, start).surprisal()
    ids = [start, *tokenizer.encode(text)]
    assert result.bits == pytest.approx(expected_bits(model, ids, 8), rel=1e-4)
    loss = evaluate(model, np.array(ids), TextSize(len(text.encode())), machine)
    assert result.total_bits == pytest.approx(loss.loss_sum / math.log(2), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(result.total_bits / len(text.encode()))
    assert result.bits_per_character == pytest.approx(result.total_bits / len(text))
    assert result.bits_per_token == pytest.approx(loss.loss / math.log(2), rel=1e-5)
    assert result.token_ids == ids[1:]
    assert result.window_starts == list(range(0, len(ids) - 1, 8))
    assert result.start_token == "\n"


def test_surprisal_has_a_text_per_token_and_bits_per_character(make_model, tokenizer, machine):
    result = inspect(make_model(tokenizer.vocab_size), tokenizer, machine, TEXT, 0).surprisal()
    assert "".join(result.token_texts) == TEXT
    assert len(result.token_texts) == len(result.token_ids) == len(result.bits)
    assert len(result.character_bits) == len(TEXT)
    assert math.fsum(result.character_bits) == pytest.approx(result.total_bits)
    in_order = sorted(range(len(result.bits)), key=lambda i: -result.bits[i])
    assert result.most_surprising == in_order[:10]


def test_surprisal_assigns_a_character_of_several_tokens_to_the_last(make_model, byte, machine):
    result = inspect(make_model(257), byte, machine, "a猫b").surprisal()
    assert result.token_texts == ["a", "", "", "猫", "b"]
    bits = result.bits
    assert result.character_bits == pytest.approx([bits[0], sum(bits[1:4]), bits[4]])


def test_surprisal_alternatives_are_the_most_probable_tokens(make_model, byte, machine):
    model = make_model(257)
    inspector = inspect(model, byte, machine, "the cat")
    result = inspector.surprisal(n_alternatives=257)
    with torch.no_grad():
        softmax = model(torch.tensor([[10, *b"the ca"]]))[0].softmax(dim=1)
    for expected, alternatives in zip(softmax, result.alternatives, strict=True):
        in_order = sorted(expected.tolist(), reverse=True)
        assert [p for _, p in alternatives] == pytest.approx(in_order)
        probs = dict(alternatives)
        assert probs["e"] == pytest.approx(expected[ord("e")].item())
        assert probs["\\xe6"] == pytest.approx(expected[0xE6].item())
    assert len(inspector.surprisal().alternatives[0]) == 10


@pytest.mark.parametrize("limit", ["BATCH_TOKENS", "BATCH_LOGITS"])
def test_surprisal_does_not_depend_on_the_batch_size(make_model, byte, machine, monkeypatch, limit):
    inspector = inspect(make_model(257), byte, machine, TEXT)
    expected = inspector.surprisal()
    monkeypatch.setattr(inspector_module, limit, 1)
    result = inspector.surprisal()
    assert result.bits == pytest.approx(expected.bits, rel=1e-5)


@torch.no_grad()
def naive_forward(model, ids: list[int]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Compute attention weights, logits and neurons by their definitions.

    One head and one token at a time.

    Returns:
        Weights (L, H, T, T), logits (T, V), and activations (T, hidden) of each layer.
    """
    config, T = model.config, len(ids)
    is_qwen3 = config.arch == "qwen3"
    D = config.n_embd // config.n_head
    n_kv_head = config.n_kv_head or config.n_head

    def rms_norm(x, weight):
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight

    def rotate(x, position):
        angles = position * config.rope_theta ** (-2 * torch.arange(D // 2) / D)
        pairs = torch.complex(x[: D // 2], x[D // 2 :])
        pairs = pairs * torch.polar(torch.ones(D // 2), angles)
        return torch.cat([pairs.real, pairs.imag])

    def norm_and_rotate(x, weight):
        return torch.stack([rotate(rms_norm(row, weight), i) for i, row in enumerate(x)])

    x = model.wte.weight[ids]
    x = rms_norm(x, 1.0) if is_qwen3 else x + model.wpe.weight[:T]
    maps, neurons = [], []
    for block in model.blocks:
        qkv = block.attn.qkv_proj(block.ln_1(x)).view(T, -1, D)
        out = torch.zeros(T, config.n_head, D)
        maps.append(np.zeros((config.n_head, T, T)))
        for h in range(config.n_head):
            kv_head = config.n_head + h * n_kv_head // config.n_head
            q, k, v = qkv[:, h], qkv[:, kv_head], qkv[:, kv_head + n_kv_head]
            if is_qwen3:
                q = norm_and_rotate(q, block.attn.q_norm.weight)
                k = norm_and_rotate(k, block.attn.k_norm.weight)
            for i in range(T):
                first = max(0, i + 1 - (config.sliding_window or T))
                weights = (q[i] @ k[first : i + 1].T / math.sqrt(D)).softmax(dim=0)
                maps[-1][h, i, first : i + 1] = weights
                out[i, h] = weights @ v[first : i + 1]
        x = x + block.attn.o_proj(out.flatten(1))
        hidden = block.mlp.up_proj(block.ln_2(x))
        if is_qwen3:
            gate, value = hidden.chunk(2, dim=1)
            hidden = gate / (1 + (-gate).exp()) * value
        else:
            inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
            hidden = 0.5 * hidden * (1 + inner.tanh())
        neurons.append(hidden.numpy())
        x = x + block.mlp.down_proj(hidden)
    return np.stack(maps), model.compute_logits(model.ln_f(x)).numpy(), neurons


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_the_definition(make_model, byte, machine, shape, implementation):
    model = make_model(257, context_length=16, **shape)
    model.set_attn_implementation(implementation)
    ids = list(b"The cat saw")
    result = inspect(model, byte, machine, "The cat saw").attention()
    maps, expected_logits, _ = naive_forward(model, ids)
    np.testing.assert_allclose(result.weights, maps, atol=2e-5)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(logits, expected_logits, atol=2e-3, rtol=1e-3)
    assert result.weights.dtype == np.float32
    np.testing.assert_allclose(result.weights.sum(axis=3), 1, atol=1e-5)
    assert not np.triu(result.weights, 1).any()
    assert (result.token_texts, result.start, result.num_tokens) == (list("The cat saw"), 0, 11)


def test_attention_reads_one_window(make_model, byte, machine, monkeypatch):
    model = make_model(257)
    result = inspect(model, byte, machine, "abcdefghijklmnop").attention(start=5)
    window = ("".join(result.token_texts), result.start, result.num_tokens)
    assert window == ("fghijklm", 5, 16)
    expected = naive_forward(model, list(b"fghijklm"))[0]
    np.testing.assert_allclose(result.weights, expected, atol=2e-5)
    monkeypatch.setattr(inspector_module, "MAX_ATTENTION_WEIGHTS", 4 * 9)
    assert inspect(model, byte, machine, "abcdef").attention().weights.shape == (2, 2, 3, 3)


def test_head_stats_are_means_of_the_weights(make_model, byte, machine):
    result = inspect(make_model(257), byte, machine, "abcdefg").attention()
    for head in result.heads:
        weights = result.weights[head.layer, head.head]
        distance = sum(weights[i, j] * (i - j) for i in range(7) for j in range(7)) / 7
        assert head.mean_distance == pytest.approx(distance, rel=1e-5)
        self_weight = np.mean([weights[i, i] for i in range(7)])
        assert head.self_weight == pytest.approx(self_weight, rel=1e-5)
        prev_weight = sum(weights[i, i - 1] for i in range(1, 7)) / 7
        assert head.prev_weight == pytest.approx(prev_weight, rel=1e-5)
        assert head.first_weight == pytest.approx(weights[:, 0].mean(), rel=1e-5)
    assert [(head.layer, head.head) for head in result.heads] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_neurons_equal_the_definition(make_model, byte, machine, shape):
    model, text = make_model(257, **shape), b"The cat saw the dog in the barn."
    windows = [list(text[i : i + 8]) for i in range(0, len(text), 8)]
    inspector = inspect(model, byte, machine, text.decode())
    for layer in (0, 1):
        expected = np.concatenate(
            [naive_forward(model, window)[2][layer] for window in windows]
        )  # (N, hidden)
        result = inspector.neurons(layer)
        std = expected.std(axis=0)
        assert result.neuron == result.top_neurons[0].neuron == std.argmax()
        assert [stats.std for stats in result.top_neurons] == pytest.approx(
            sorted(std, reverse=True)[:20], rel=1e-4
        )
        np.testing.assert_allclose(
            result.activations, expected[:, result.neuron], atol=1e-3, rtol=1e-3
        )
        top_positions = np.argsort(-result.activations)[:3].tolist()
        assert result.top_neurons[0].top_positions == top_positions
        third = inspector.neurons(layer, 3)
        np.testing.assert_allclose(third.activations, expected[:, 3], atol=1e-3, rtol=1e-3)


def test_excerpts_have_the_highest_activations(make_model, byte, machine, monkeypatch):
    model, tokens = make_model(257), np.frombuffer((TEXT * 3).encode(), np.uint8)
    windows = [tokens[i : i + 8].tolist() for i in range(0, len(tokens) - 7, 8)]
    expected = np.stack([naive_forward(model, window)[2][1][:, 7] for window in windows])
    inspector = inspect(model, byte, machine, held_out=tokens)
    with monkeypatch.context() as patch:
        patch.setattr(inspector_module, "EXCERPT_RADIUS", 2)
        excerpts = inspector.top_activating_excerpts(1, 7, n=4)
    assert [excerpt.activations[excerpt.peak] for excerpt in excerpts] == pytest.approx(
        sorted(expected.max(axis=1), reverse=True)[:4], rel=1e-3
    )
    for excerpt in excerpts:
        start = excerpt.position - excerpt.peak
        stop = start + len(excerpt.token_texts)
        np.testing.assert_allclose(
            excerpt.activations, expected.reshape(-1)[start:stop], atol=1e-3, rtol=1e-3
        )
        assert len(excerpt.token_texts) <= 5
        assert excerpt.token_texts == token_texts(byte, tokens[start:stop].tolist())
    monkeypatch.setattr(inspector_module, "MAX_SEARCH_TOKENS", 16)
    excerpts = inspector.top_activating_excerpts(1, 7)
    assert {excerpt.position // 8 for excerpt in excerpts} == {0, len(tokens) // 8 - 1}
    inspector = inspect(model, byte, machine, held_out=tokens[:5])
    (excerpt,) = inspector.top_activating_excerpts(1, 7)
    assert excerpt.position < 5


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_embedding_equals_the_principal_components(make_model, byte, machine, shape):
    model = make_model(257, **shape)
    result = inspect(model, byte, machine, unseen=[[0, 32], [127, 257]]).embedding()
    assert result.token_ids == list(range(32, 127))
    assert result.token_texts == [chr(i) for i in range(32, 127)]
    x = model.wte.weight.detach().double().numpy()
    x = (x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) if shape else x)[32:127]
    x -= x.mean(axis=0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    coords = result.coords
    np.testing.assert_allclose(np.abs(coords), np.abs(u[:, :2] * s[:2]), atol=1e-4)
    ratio = tuple(s[:2] ** 2 / (s**2).sum())
    assert result.explained_variance_ratio == pytest.approx(ratio, rel=1e-5)
    assert result.asdict()["explained_variance_ratio"] == list(result.explained_variance_ratio)
    assert (coords[np.abs(coords).argmax(axis=0), [0, 1]] > 0).all()


def test_hooks_ignore_other_threads(make_model):
    model = make_model(257)
    calls = []
    with (
        forward_pre_hooks([model.ln_f], lambda index, inputs: calls.append(index)),
        torch.no_grad(),
    ):
        other = threading.Thread(target=lambda: model(torch.tensor([[1, 2]])))
        other.start()
        other.join()
        assert not calls
        model(torch.tensor([[1, 2]]))
    model(torch.tensor([[1, 2]]))
    assert calls == [0]


def test_invalid_requests_raise_user_errors(make_model, byte, machine):
    args = (make_model(257), byte, machine)
    tokens = np.arange(20)
    for request, message in [
        (inspect(*args, "").surprisal, "the text is empty"),
        (inspect(*args, "").attention, "the text is empty"),
        (inspect(*args, "a" * 20_001).neurons, r"20,001 tokens \(limit 20,000\)"),
        (inspect(*args, "\ud800").surprisal, "surrogate"),
        (lambda: inspect(*args, "abc").attention(3), "Token 3 does not exist"),
        (lambda: inspect(*args, "abc").neurons(2), "no layer 2: the model has layers 0 to 1"),
        (
            lambda: inspect(*args, "abc").neurons(0, 64),
            "no neuron 64: a layer has neurons 0 to 63",
        ),
        (
            lambda: inspect(*args, held_out=tokens).top_activating_excerpts(0, -1),
            "no neuron -1",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            request()


class Page(HTMLParser):
    """Tags, addresses and text of an HTML page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "action", "data")
        ]

    def handle_data(self, data):
        self.text += data


def all_results(model, byte, machine, text):
    """Return a result of each kind, by the name of the functions that render it."""
    inspector = inspect(model, byte, machine, text)
    names = ("surprisal", "attention", "neurons", "embedding")
    return {name: getattr(inspector, name)() for name in names}


def test_html_escapes_text_and_loads_nothing(make_model, byte, machine):
    inspection_html.attach_notebook_displays()
    results = all_results(make_model(257, context_length=64), byte, machine, HOSTILE_TEXT)
    for name, result in results.items():
        html = inspection_html.page(HOSTILE_TEXT, getattr(inspection_html, name)(result))
        page = Page(html)
        assert page.tags.count("script") == (name == "attention")
        assert "alert" not in page.tags
        assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
        assert not re.search(r"https?:|@import|url\(", html)
        assert "\x1b" not in html
        assert "\x00" not in html
        if name != "embedding":
            assert "<script>alert('x')</script>" in page.text
        assert result._repr_html_() in html
        json.dumps(result.asdict())


def test_html_attention_maps_encode_the_weights(make_model, byte, machine):
    result = inspect(make_model(257), byte, machine, "abcdefg").attention()
    maps = re.findall(r"base64,([^\"]+)", inspection_html.attention(result))
    assert len(maps) == 4
    for i, data in enumerate(maps):
        png = base64.b64decode(data)
        chunk = png.index(b"IDAT")
        size = int.from_bytes(png[chunk - 4 : chunk])
        pixels = zlib.decompress(png[chunk + 4 : chunk + 4 + size])
        rows = np.frombuffer(pixels, np.uint8).reshape(7, 8)
        assert not rows[:, 0].any()
        weights = result.weights[i // 2, i % 2]
        np.testing.assert_allclose((rows[:, 1:] / 255) ** 2, weights, atol=0.005)


def test_terminal_output_has_no_control_characters(make_model, byte, machine):
    from rich.console import Console

    from nanogpt.render.terminal import sanitize

    results = all_results(make_model(257, context_length=64), byte, machine, HOSTILE_TEXT)
    del results["embedding"]
    for name, result in results.items():
        for has_color in (True, False):
            console = Console(
                force_terminal=has_color,
                color_system="truecolor" if has_color else None,
                no_color=not has_color,
                width=200,
                soft_wrap=True,
            )
            with console.capture() as capture:
                console.print(getattr(inspection_terminal, name)(result, sanitize))
            text = capture.get()
            assert ("\x1b[" in text) == has_color
            assert "\x1b[31m" not in text
            assert "\x00" not in text
            if name != "attention":
                assert "<script>" in re.sub(r"\x1b\[[\d;]*m", "", text)


def test_model_inspect_returns_all_results(trained, story):
    inspector = trained.inspect(story.read_text()[:200])
    surprisal = inspector.surprisal()
    assert surprisal.start_token == "\n"
    assert surprisal.total_bits == pytest.approx(200 * surprisal.bits_per_token)
    assert inspector.attention().weights.shape == (2, 2, 16, 16)
    assert len(inspector.neurons(1, 5, n_excerpts=3).excerpts) == 3
    assert inspector.embedding().token_ids == sorted(
        trained.tokenizer.encode("".join(sorted(set(story.read_text()))))
    )


def test_notebook_displays_inspector_and_results(trained, story):
    inspector = trained.inspect(story.read_text()[:200])
    assert inspector._repr_html_() == inspection_html.surprisal(inspector.surprisal())
    for name in ("surprisal", "attention", "neurons", "embedding", "memorization"):
        result = getattr(inspector, name)()
        assert result._repr_html_() == getattr(inspection_html, name)(result)


def test_notebook_displays_a_model_with_its_training(trained):
    page = Page(trained._repr_html_())
    assert page.tags.count("tr") == 1 + len(trained.summary["baselines"]) + 1
    for part in (
        repr(trained),
        trained.summary["diagnosis"]["summary"],
        f"{trained.summary['val_loss']:.4f}",
    ):
        assert part in page.text
    without_diagnosis = inspection_html.model("<x>", {"baselines": {"uniform": 2.0}})
    assert "diagnosis" not in without_diagnosis
    assert "<x>" not in without_diagnosis


@pytest.mark.parametrize("name", ["surprisal", "attention", "neurons", "memorization"])
def test_inspect_command_prints_html_and_json(trained, story, tmp_path, capsys, name):
    path = tmp_path / "page.html"
    assert run("inspect", tmp_path / "run", story, f"--{name}", "--html", path) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert {
        "surprisal": "bits:",
        "attention": "mean distance",
        "neurons": "validation split",
        "memorization": "training text",
    }[name] in printed
    assert Page(path.read_text()).tags[:2] == ["html", "head"]
    args = ("--text", "The cat saw", f"--{name}", "--json", "--dtype", "float32")
    assert run("inspect", tmp_path / "run", *args) == 0
    printed = json.loads(capsys.readouterr().out)
    inspector = trained.inspect("The cat saw")
    expected = inspector.neurons(n_excerpts=5) if name == "neurons" else getattr(inspector, name)()
    assert printed == json.loads(json.dumps(expected.asdict()))


def test_inspect_command_prints_surprisal_by_default(trained, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("The cat\n")
    assert run("inspect", tmp_path / "run" / "model.safetensors", tmp_path / "text.txt") == 0
    out = capsys.readouterr().out
    assert out.startswith("The cat\n")
    assert "8 characters, 8 tokens" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "No text to inspect"),
        (["FILE", "--text", "x"], "Both a file and --text"),
        (["The cat saw the dog."], '--text "..."'),
        (["--text", ""], "the text is empty"),
        (["--text", "x", "--memorization", "--attention"], "Ask for one at a time"),
        (["--text", "x", "--layer", 1], "Use them with --neurons"),
        (["--text", "x", "--neurons", "--layer", 9], "layers 0 to 1"),
    ],
)
def test_inspect_command_reports_invalid_arguments(trained, story, tmp_path, capsys, args, message):
    args = [story if arg == "FILE" else arg for arg in args]
    assert run("inspect", tmp_path / "run", *args) == 2
    assert message in capsys.readouterr().err
