"""What is seen inside equals a direct computation from the weights; what is drawn escapes all text; what cannot be looked at is said in words."""

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
from conftest import TINY
from test_cli import run

import nanogpt
from nanogpt.errors import UserError
from nanogpt.evaluate import evaluate
from nanogpt.look import html, inside, terminal
from nanogpt.tokenizer import train_tokenizer

TEXT = "The cat — die Katze — 猫 saw the dög. 🙂 the cat saw; the dog saw the cat.\n" * 3
SHAPES = [{}, {"arch": "modern"}, {"arch": "modern", "n_head": 4, "n_kv_head": 2, "window": 3}]
NASTY = "<script>alert('x')</script> & \"quotes\" \x1b[31m\x00 a"


@pytest.fixture(scope="module", params=["char", "byte", "word", "bpe"])
def tokenizer(request):
    return train_tokenizer(request.param, [TEXT], {"word": 280, "bpe": 285}.get(request.param))


@pytest.fixture(scope="module")
def byte():
    return train_tokenizer("byte", [])


@pytest.fixture
def trained(story, tmp_path):
    return nanogpt.train(story, tmp_path / "run", **TINY | {"steps": 4, "eval_every": 2, "dropout": 0.0})


@torch.no_grad()
def window_bits(model, line: list[int], T: int) -> list[float]:
    """The bits of each token of a line but the first, one at a time, in windows side by side."""
    bits = []
    for at in range(1, len(line)):
        begin = (at - 1) // T * T
        bits.append(-model(torch.tensor([line[begin:at]]))[0, -1].double().log_softmax(dim=0)[line[at]].item() / math.log(2))
    return bits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", [TEXT, TEXT[:7], "a"])
def test_surprise_is_the_models_loss_on_the_text(make_model, tokenizer, place, shape, text):
    model, start = make_model(tokenizer.vocab_size, **shape), tokenizer.encode("\n")[0]
    found = inside.surprise(model, tokenizer, place, text, start)
    line = [start, *tokenizer.encode(text)]
    assert found.bits == pytest.approx(window_bits(model, line, 8), rel=1e-4)
    loss = evaluate(model, np.array(line), len(text.encode()), place)
    assert found.total_bits == pytest.approx(loss.nats / math.log(2), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(found.total_bits / len(text.encode()))
    assert found.bits_per_character == pytest.approx(found.total_bits / len(text))
    assert found.bits_per_token == pytest.approx(loss.val_loss / math.log(2), rel=1e-5)
    assert (found.ids, found.windows, found.start) == (line[1:], list(range(0, len(line) - 1, 8)), "\n")


def test_surprise_has_a_piece_for_each_token_and_bits_for_each_character(make_model, tokenizer, place):
    found = inside.surprise(make_model(tokenizer.vocab_size), tokenizer, place, TEXT, 0)
    assert "".join(found.pieces) == TEXT
    assert len(found.pieces) == len(found.ids) == len(found.bits)
    assert len(found.character_bits) == len(TEXT)
    assert math.fsum(found.character_bits) == pytest.approx(found.total_bits)
    assert found.most == sorted(range(len(found.bits)), key=lambda i: -found.bits[i])[:10]


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(make_model, byte, place):
    found = inside.surprise(make_model(257), byte, place, "a猫b", 10)
    assert found.pieces == ["a", "", "", "猫", "b"]
    assert found.character_bits == pytest.approx([found.bits[0], sum(found.bits[1:4]), found.bits[4]])


def test_alternatives_are_the_likeliest_of_the_softmax(make_model, byte, place):
    model = make_model(257)
    found = inside.surprise(model, byte, place, "the cat", 10, n_alternatives=257)
    with torch.no_grad():
        softmax = model(torch.tensor([[10, *b"the ca"]]))[0].softmax(dim=1)
    for place_, row in zip(softmax, found.alternatives, strict=True):
        assert [p for _, p in row] == pytest.approx(sorted(place_.tolist(), reverse=True))
        chances = dict(row)
        assert chances["e"] == pytest.approx(place_[ord("e")].item())
        assert chances["\\xe6"] == pytest.approx(place_[0xE6].item())
    assert len(inside.surprise(model, byte, place, "the cat", 10).alternatives[0]) == 10


@pytest.mark.parametrize("limit", ["BATCH_TOKENS", "BATCH_LOGITS"])
def test_the_size_of_a_pass_changes_nothing(make_model, byte, place, monkeypatch, limit):
    model = make_model(257)
    whole = inside.surprise(model, byte, place, TEXT, 10)
    monkeypatch.setattr(inside, limit, 1)
    assert inside.surprise(model, byte, place, TEXT, 10).bits == pytest.approx(whole.bits, rel=1e-5)


@torch.no_grad()
def slow_attention(model, ids: list[int]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Weights (L, H, T, T), logits (T, V) and what each layer's neurons do (T, hidden), by the definitions, a head and a token at a time."""
    config, T = model.config, len(ids)
    modern, D, kv = config.arch == "modern", config.n_embd // config.n_head, config.n_kv_head or config.n_head

    def rms(x, weight):
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight

    def turned(x, at):
        i = torch.arange(D // 2)
        pairs = torch.complex(x[: D // 2], x[D // 2 :]) * torch.polar(torch.ones(D // 2), at * config.rope_base ** (-2 * i / D))
        return torch.cat([pairs.real, pairs.imag])

    x = model.wte.weight[ids]
    x = rms(x, 1.0) if modern else x + model.wpe.weight[:T]
    maps, neurons = [], []
    for block in model.blocks:
        qkv = block.attn.qkv(block.ln_1(x)).view(T, -1, D)
        out = torch.zeros(T, config.n_head, D)
        maps.append(np.zeros((config.n_head, T, T)))
        for h in range(config.n_head):
            group = h * kv // config.n_head
            q, k, v = qkv[:, h], qkv[:, config.n_head + group], qkv[:, config.n_head + kv + group]
            if modern:
                q = torch.stack([turned(rms(each, block.attn.q_norm.weight), at) for at, each in enumerate(q)])
                k = torch.stack([turned(rms(each, block.attn.k_norm.weight), at) for at, each in enumerate(k)])
            for i in range(T):
                first = max(0, i + 1 - (config.window or T))
                share = (q[i] @ k[first : i + 1].T / math.sqrt(D)).softmax(dim=0)
                maps[-1][h, i, first : i + 1] = share
                out[i, h] = share @ v[first : i + 1]
        x = x + block.attn.proj(out.flatten(1))
        inner = block.mlp.fc(block.ln_2(x))
        if modern:
            gate, value = inner.chunk(2, dim=1)
            inner = gate / (1 + (-gate).exp()) * value
        else:
            inner = 0.5 * inner * (1 + (math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)).tanh())
        neurons.append(inner.numpy())
        x = x + block.mlp.proj(inner)
    return np.stack(maps), model.logits(model.ln_f(x)).numpy(), neurons


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_that_of_the_definition_and_gives_the_models_logits(make_model, byte, place, shape, fused):
    model = make_model(257, context_length=16, **shape)
    model.fuse_attention(fused)
    found = inside.attention(model, byte, place, "The cat saw")
    maps, logits, _ = slow_attention(model, list(b"The cat saw"))
    np.testing.assert_allclose(found.weights, maps, atol=2e-5)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor([list(b"The cat saw")]))[0].numpy(), logits, atol=2e-3, rtol=1e-3)
    assert found.weights.dtype == np.float32
    np.testing.assert_allclose(found.weights.sum(axis=3), 1, atol=1e-5)
    assert not np.triu(found.weights, 1).any()
    assert (found.pieces, found.first, found.tokens) == (list("The cat saw"), 0, 11)


def test_attention_is_on_a_part_of_a_text_that_fills_the_context(make_model, byte, place, monkeypatch):
    model = make_model(257)
    found = inside.attention(model, byte, place, "abcdefghijklmnop", first=5)
    assert ("".join(found.pieces), found.first, found.tokens) == ("fghijklm", 5, 16)
    np.testing.assert_allclose(found.weights, slow_attention(model, list(b"fghijklm"))[0], atol=2e-5)
    monkeypatch.setattr(inside, "MOST_WEIGHTS", 4 * 9)
    assert inside.attention(model, byte, place, "abcdef").weights.shape == (2, 2, 3, 3)


def test_heads_are_told_by_where_they_look(make_model, byte, place):
    found = inside.attention(make_model(257), byte, place, "abcdefg")
    for head in found.heads:
        weights = found.weights[head.layer, head.head]
        assert head.distance == pytest.approx(sum(weights[i, j] * (i - j) for i in range(7) for j in range(7)) / 7, rel=1e-5)
        assert head.own == pytest.approx(np.mean([weights[i, i] for i in range(7)]), rel=1e-5)
        assert head.previous == pytest.approx(sum(weights[i, i - 1] for i in range(1, 7)) / 7, rel=1e-5)
        assert head.first == pytest.approx(weights[:, 0].mean(), rel=1e-5)
    assert [(head.layer, head.head) for head in found.heads] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_neurons_are_those_of_the_definition(make_model, byte, place, shape):
    model, text = make_model(257, **shape), b"The cat saw the dog in the barn."
    for layer in (0, 1):
        direct = np.concatenate([slow_attention(model, list(text[i : i + 8]))[2][layer] for i in range(0, len(text), 8)])  # (N, hidden)
        found = inside.neurons(model, byte, place, text.decode(), layer)
        spread = direct.std(axis=0)
        assert found.neuron == found.strongest[0].neuron == spread.argmax()
        assert [each.spread for each in found.strongest] == pytest.approx(sorted(spread, reverse=True)[:20], rel=1e-4)
        np.testing.assert_allclose(found.activations, direct[:, found.neuron], atol=1e-3, rtol=1e-3)
        assert found.strongest[0].highest == np.argsort(-found.activations)[:3].tolist()
        np.testing.assert_allclose(inside.neurons(model, byte, place, text.decode(), layer, 3).activations, direct[:, 3], atol=1e-3, rtol=1e-3)


def test_excerpts_are_the_places_where_a_neuron_is_most_active(make_model, byte, place, monkeypatch):
    model, tokens = make_model(257), np.frombuffer((TEXT * 3).encode(), np.uint8)
    direct = np.concatenate([slow_attention(model, tokens[i : i + 8].tolist())[2][1][:, 7] for i in range(0, len(tokens) - 7, 8)]).reshape(-1, 8)
    found = inside.exciting(model, byte, place, tokens, 1, 7, n=4, width=2)
    assert [excerpt.activations[excerpt.peak] for excerpt in found] == pytest.approx(sorted(direct.max(axis=1), reverse=True)[:4], rel=1e-3)
    for excerpt in found:
        begin = excerpt.position - excerpt.peak
        np.testing.assert_allclose(excerpt.activations, direct.reshape(-1)[begin : begin + len(excerpt.pieces)], atol=1e-3, rtol=1e-3)
        assert len(excerpt.pieces) <= 5
        assert excerpt.pieces == inside.pieces(byte, tokens[begin : begin + len(excerpt.pieces)].tolist())
    monkeypatch.setattr(inside, "EXCITING_TOKENS", 16)
    assert {excerpt.position // 8 for excerpt in inside.exciting(model, byte, place, tokens, 1, 7)} == {0, len(tokens) // 8 - 1}
    (only,) = inside.exciting(model, byte, place, tokens[:5], 1, 7)
    assert only.position < 5


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_map_of_the_alphabet_is_its_principal_components(make_model, byte, shape):
    model = make_model(257, **shape)
    found = inside.embedding(model, byte, unused=[[0, 32], [127, 257]])
    assert found.ids == list(range(32, 127))
    assert found.pieces == [chr(i) for i in range(32, 127)]
    x = model.wte.weight.detach().double().numpy()
    x = (x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) if shape else x)[32:127]
    x -= x.mean(axis=0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(np.abs(found.xy), np.abs(u[:, :2] * s[:2]), atol=1e-4)
    assert found.explained == pytest.approx(tuple(s[:2] ** 2 / (s**2).sum()), rel=1e-5)
    assert (found.xy[np.abs(found.xy).argmax(axis=0), [0, 1]] > 0).all()


def test_other_threads_are_not_heard(make_model, byte, place):
    model = make_model(257)
    heard = []
    with inside.listening([model.ln_f], lambda number, inputs: heard.append(number)), torch.no_grad():
        other = threading.Thread(target=lambda: model(torch.tensor([[1, 2]])))
        other.start()
        other.join()
        assert not heard
        model(torch.tensor([[1, 2]]))
    model(torch.tensor([[1, 2]]))
    assert heard == [0]


def test_what_cannot_be_looked_at_is_said(make_model, byte, place):
    model = make_model(257)
    for look, said in [
        (lambda: inside.surprise(model, byte, place, "", 10), "the text is empty"),
        (lambda: inside.attention(model, byte, place, ""), "the text is empty"),
        (lambda: inside.neurons(model, byte, place, "a" * 20_001), "20,001 tokens; at most 20,000"),
        (lambda: inside.surprise(model, byte, place, "\ud800", 10), "surrogate"),
        (lambda: inside.attention(model, byte, place, "abc", 3), "there is none number 3"),
        (lambda: inside.neurons(model, byte, place, "abc", 2), "no layer 2: the model has 2"),
        (lambda: inside.neurons(model, byte, place, "abc", 0, 64), "no neuron 64: a layer has 64"),
        (lambda: inside.exciting(model, byte, place, np.arange(20), 0, -1), "no neuron -1"),
    ]:
        with pytest.raises(UserError, match=said):
            look()


class Reader(HTMLParser):
    """Collects the tags, the addresses and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_data(self, data):
        self.text += data


def all_pictures(model, byte, place, text):
    """One fragment of each kind, and what it is made of."""
    return {
        html.surprise: inside.surprise(model, byte, place, text, 10),
        html.attention: inside.attention(model, byte, place, text),
        html.neurons: inside.neurons(model, byte, place, text),
        html.embedding: inside.embedding(model, byte),
    }


def test_pages_escape_all_text_and_ask_the_network_for_nothing(make_model, byte, place):
    for draw, found in all_pictures(make_model(257, context_length=64), byte, place, NASTY).items():
        page = html.page(NASTY, draw(found))
        seen = Reader(page)
        assert seen.tags.count("script") == (draw is html.attention)
        assert "alert" not in seen.tags
        assert all(address.startswith("data:image/png;base64,") for address in seen.addresses)
        assert not re.search(r"https?:|@import|url\(", page)
        assert "\x1b" not in page
        assert "\x00" not in page
        if draw is not html.embedding:
            assert "<script>alert('x')</script>" in seen.text
        assert found._repr_html_() in page
        json.dumps(found.asdict())


def test_maps_are_pictures_of_the_weights(make_model, byte, place):
    found = inside.attention(make_model(257), byte, place, "abcdefg")
    maps = re.findall(r"base64,([^\"]+)", html.attention(found))
    assert len(maps) == 4
    for number, data in enumerate(maps):
        png = base64.b64decode(data)
        at = png.index(b"IDAT")
        rows = np.frombuffer(zlib.decompress(png[at + 4 : at + 4 + int.from_bytes(png[at - 4 : at])]), np.uint8).reshape(7, 8)
        assert not rows[:, 0].any()
        np.testing.assert_allclose((rows[:, 1:] / 255) ** 2, found.weights[number // 2, number % 2], atol=0.005)


def test_the_terminal_gets_no_control_characters_and_colours_only_where_there_are_any(make_model, byte, place):
    from rich.console import Console

    from nanogpt.report import printable

    for draw, found in all_pictures(make_model(257, context_length=64), byte, place, NASTY).items():
        if draw is html.embedding:
            continue
        for colours in (True, False):
            console = Console(force_terminal=colours, color_system="truecolor" if colours else None, no_color=not colours, width=200, soft_wrap=True)
            with console.capture() as capture:
                console.print(getattr(terminal, draw.__name__)(found, printable))
            text = capture.get()
            assert ("\x1b[" in text) == colours
            assert "\x1b[31m" not in text
            assert "\x00" not in text
            if draw is not html.attention:
                assert "<script>" in re.sub(r"\x1b\[[\d;]*m", "", text)


def test_a_model_looks_at_a_text(trained, story):
    seen = trained.look(story.read_text()[:200])
    found = seen.surprise()
    assert found.start == "\n"
    assert found.total_bits == pytest.approx(200 * found.bits_per_token)
    assert seen._repr_html_() == html.surprise(found)
    assert seen.attention().weights.shape == (2, 2, 16, 16)
    assert len(seen.neurons(1, 5, n_excerpts=3).excerpts) == 3
    assert seen.embedding().ids == sorted(trained.tokenizer.encode("".join(sorted(set(story.read_text())))))


def test_a_model_shows_what_came_of_its_training(trained):
    page = Reader(trained._repr_html_())
    assert page.tags.count("tr") == 1 + len(trained.summary["baselines"]) + 1
    for part in (repr(trained), trained.summary["verdict"]["sentence"], f"{trained.summary['val_loss']:.4f}"):
        assert part in page.text
    assert "verdict" not in html.model("<x>", {"baselines": {"uniform": 2.0}})
    assert "<x>" not in html.model("<x>", {"baselines": {"uniform": 2.0}})


@pytest.mark.parametrize("what", ["surprise", "attention", "neurons", "copies"])
def test_the_command_prints_and_draws_and_gives_json(trained, story, tmp_path, capsys, what):
    path = tmp_path / "page.html"
    assert run("look", tmp_path / "run", story, f"--{what}", "--html", path) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert {"surprise": "bits:", "attention": "tokens back", "neurons": "validation split", "copies": "training text"}[what] in printed
    assert Reader(path.read_text()).tags[:2] == ["html", "head"]
    assert run("look", tmp_path / "run", "--text", "The cat saw", f"--{what}", "--json", "--dtype", "float32") == 0
    answer = json.loads(capsys.readouterr().out)
    seen = trained.look("The cat saw")
    direct = seen.neurons(n_excerpts=5) if what == "neurons" else getattr(seen, what)()
    assert answer == json.loads(json.dumps(direct.asdict()))


def test_without_a_switch_the_command_shows_surprise(trained, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("The cat\n")
    assert run("look", tmp_path / "run" / "model.safetensors", tmp_path / "text.txt") == 0
    out = capsys.readouterr().out
    assert out.startswith("The cat\n")
    assert "8 characters, 8 tokens" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Which text?"),
        (["FILE", "--text", "x"], "Both a file and --text"),
        (["The cat saw the dog."], '--text "..."'),
        (["--text", ""], "the text is empty"),
        (["--text", "x", "--copies", "--attention"], "Ask for one at a time"),
        (["--text", "x", "--layer", 1], "Use them with --neurons"),
        (["--text", "x", "--neurons", "--layer", 9], "Use --layer 0 to 1"),
    ],
)
def test_mistakes_are_answered_in_words(trained, story, tmp_path, capsys, words, said):
    assert run("look", tmp_path / "run", *(story if word == "FILE" else word for word in words)) == 2
    assert said in capsys.readouterr().err
