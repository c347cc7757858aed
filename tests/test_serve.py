"""The server, as its clients see it: real processes and sockets, and OpenAI's own client."""

import asyncio
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from nanogpt import checkpoint, library, serve
from nanogpt.config import ModelConfig, PlaceConfig, ServeConfig
from nanogpt.errors import UserError
from nanogpt.serve.metrics import Metrics
from nanogpt.serve.models import Models
from nanogpt.serve.wire import WORK, CompletionRequest
from nanogpt.tokenizer import train_tokenizer

ROWS, QUEUE = 4, 40
HERE = ["--device", "cpu", "--dtype", "float32", "--threads", "1"]  # nothing is measured
LONG = 100_000  # tokens that no test waits for
PLACE = PlaceConfig(device="cpu", dtype="float32", threads=1)


def make_run(folder, seed):
    """A folder with a tiny model of random weights, which training is said to have shown one sentence."""
    sentence = "the quick brown fox jumps over the lazy dog\n"
    tokenizer = train_tokenizer("char", [sentence])
    unused = [[i, i + 1] for i in range(tokenizer.vocab_size) if i not in tokenizer.encode(sentence)]
    model = checkpoint.empty_model(ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32, dropout=0.0), tokenizer.vocab_size, "cpu")
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() == 2 else 1.0)
    checkpoint.save_model(folder / "model.safetensors", model, tokenizer, {"step": 1, "unused": unused})


class Server:
    """A running server: its process, its address, and ways to ask it."""

    def __init__(self, process, url):
        self.process, self.url = process, url
        self.host, self.port = re.fullmatch(r"http://([\d.]+):(\d+)", url).groups()

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 300} | options)

    def ask(self, method, path, body=None, headers=None):
        """Status and content of an answer, by plain HTTP."""
        connection = http.client.HTTPConnection(self.host, int(self.port), timeout=300)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def post(self, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", "/v1/completions", body, {"Content-Type": "application/json"} | headers)

    def gauge(self, name, model="a"):
        """What /metrics tells of a model."""
        found = re.search(rf'^{name}{{model="{model}"}} (\d+)$', self.ask("GET", "/metrics")[1].decode(), re.M)
        return int(found[1]) if found else 0

    def wait_until(self, name, value, model="a"):
        until = time.monotonic() + 120
        while self.gauge(name, model) != value:
            assert time.monotonic() < until, f"{name} is {self.gauge(name, model)} and not {value}"
            time.sleep(0.02)


@contextmanager
def serving(path, *words, env=None, before=""):
    """`nanogpt serve` in a process of its own; Python may be told something before."""
    code = f"import nanogpt.serve; from nanogpt.cli import main\n{before}\nmain()"
    command = [sys.executable, "-c", code, "serve", str(path), "--port", "0", *HERE, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | (env or {}))
    try:
        while not (address := re.fullmatch(r"Page +(http://\S+)/\n", line := process.stdout.readline())):
            assert line, f"it ended with {process.wait()}"
        yield Server(process, address[1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module", autouse=True)
def _shared_cache(measured):
    """What outlives a test uses what was compiled for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(measured))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("a", "b")):
        make_run(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def server(runs):
    with serving(runs, "--rows", ROWS, "--queue", QUEUE, "--deterministic") as server:
        yield server


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def model(runs):
    return library.load(runs / "a", **PLACE.model_dump())


def own(model, prompt, **options):
    """What the library writes."""
    return "".join(model.stream(prompt, **{"temperature": 1.0, "max_tokens": 16} | options))


def test_it_is_what_the_library_writes(client, model):
    answer = client.completions.create(model="a", prompt="the ", max_tokens=60, seed=3, temperature=0.7, top_p=0.9)
    assert answer.choices[0].text == own(model, "the ", max_tokens=60, seed=3, temperature=0.7, top_p=0.9)
    assert (answer.choices[0].finish_reason, answer.object, answer.model) == ("length", "text_completion", "a")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 60, 64)


def test_the_defaults_are_the_api_s(client, model):
    assert client.completions.create(model="a", prompt="the ", seed=5).choices[0].text == own(model, "the ", seed=5, max_tokens=16, temperature=1.0)


def test_a_stream_brings_the_same(client, model):
    chunks = list(client.completions.create(model="a", prompt="the ", max_tokens=300, seed=3, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == own(model, "the ", max_tokens=300, seed=3)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 300)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_comes_while_it_is_written(client):
    with client.completions.create(model="a", prompt="the ", max_tokens=LONG, stream=True) as stream:
        assert [next(stream).choices[0].finish_reason for _ in range(3)] == [None] * 3


def test_settings_that_only_open_models_have(client, model):
    options = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5}
    answer = client.completions.create(model="a", prompt="the ", max_tokens=40, seed=3, extra_body=options)
    assert answer.choices[0].text == own(model, "the ", max_tokens=40, seed=3, **options)


def test_several_prompts_and_texts(client, model):
    answer = client.completions.create(model="a", prompt=["the ", "a dog"], n=2, seed=7)
    expected = [own(model, prompt, seed=seed) for prompt in ("the ", "a dog") for seed in (7, 8)]
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected))


def test_a_prompt_of_tokens(client, model):
    ids = model.tokenizer.encode("the ")
    expected = own(model, "the ", seed=1)
    assert client.completions.create(model="a", prompt=ids, seed=1).choices[0].text == expected
    assert [c.text for c in client.completions.create(model="a", prompt=[ids, ids], seed=1).choices] == [expected] * 2


def test_without_a_prompt_a_text_begins(client, model):
    assert client.completions.create(model="a", prompt="", seed=1, echo=True).choices[0].text == own(model, None, seed=1)


def test_a_bias_forces_a_token(client, model):
    q = model.tokenizer.encode("q")[0]
    assert client.completions.create(model="a", prompt="the ", logit_bias={str(q): 100}).choices[0].text == "q" * 16


def logprobs_of(model, ids):
    """(T - 1, V): what the model says follows each token, without those that training never had."""
    logits = torch.tensor(model.logits([ids])[0, :-1]).double()
    for first, behind in model.summary["unused"]:
        logits[:, first:behind] = -torch.inf
    return logits.log_softmax(dim=1).numpy()


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_model_s(client, model, stream):
    asked = client.completions.create(model="a", prompt="the ", max_tokens=20, seed=3, temperature=0.5, top_p=0.5, logprobs=2, echo=True, stream=stream)
    choices = [chunk.choices[0] for chunk in asked] if stream else [asked.choices[0]]
    text = "".join(choice.text for choice in choices)
    told = [choice.logprobs for choice in choices]
    fields = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    tokens, given, tops, places = ([value for one in told for value in getattr(one, name)] for name in fields)
    assert "".join(tokens) == text == "the " + own(model, "the ", max_tokens=20, seed=3, temperature=0.5, top_p=0.5)
    assert places == list(range(len(text)))
    ids = model.tokenizer.encode(text)
    expected = logprobs_of(model, ids)
    assert given[0] is None
    assert tops[0] is None
    np.testing.assert_allclose(given[1:], expected[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
    for row, top in zip(expected, tops[1:], strict=True):
        best = np.argsort(-row)[:2]
        assert list(top) == [model.tokenizer.decode([i]) for i in best]
        np.testing.assert_allclose(list(top.values()), row[best], atol=1e-4)


def test_a_prompt_alone_is_judged(client, model):
    answer = client.completions.create(model="a", prompt="the dog", max_tokens=0, logprobs=0, echo=True)
    assert answer.choices[0].text == "the dog"
    assert answer.choices[0].logprobs.top_logprobs is None
    assert answer.usage.completion_tokens == 0
    ids = model.tokenizer.encode("the dog")
    np.testing.assert_allclose(answer.choices[0].logprobs.token_logprobs[1:], logprobs_of(model, ids)[np.arange(6), ids[1:]], atol=1e-4)


def test_characters_of_several_tokens_stay_whole(client, model):
    """Biases make it write the four bytes of 🦊 again and again, which training had no token for."""
    fox = model.tokenizer.encode("🦊")
    assert len(fox) == 4
    answer = client.completions.create(model="a", prompt=fox[:2], max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].logprobs.tokens == ["bytes:\\xf0", "bytes:\\x9f"]
    assert answer.choices[0].logprobs.token_logprobs[1] == -9999.0


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_not_told(client, model, stream):
    text = own(model, "the ", max_tokens=60, seed=3)
    stop = text[20:23]
    asked = client.completions.create(model="a", prompt="the ", max_tokens=60, seed=3, stop=[stop, "never"], logprobs=0, stream=stream)
    choices = [chunk.choices[0] for chunk in asked] if stream else [asked.choices[0]]
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert "".join(token for choice in choices for token in choice.logprobs.tokens) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["a", "b"]
    assert client.models.retrieve("b").owned_by == "nanogpt"
    with pytest.raises(openai.NotFoundError, match="no model 'c'"):
        client.models.retrieve("c")


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"model": "../a"}, openai.NotFoundError, "model"),
        ({"prompt": {"text": "a"}}, openai.BadRequestError, "prompt"),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"prompt": [1, "a"]}, openai.BadRequestError, "prompt"),
        ({"prompt": [-1]}, openai.BadRequestError, "prompt"),
        ({"prompt": [10**6]}, openai.BadRequestError, "prompt"),
        ({"prompt": [10**30]}, openai.BadRequestError, "prompt"),
        ({"prompt": "a" * 70_000}, openai.BadRequestError, "prompt"),
        ({"prompt": "a" * 2_000_000}, openai.APIStatusError, None),
        ({"prompt": "a" * 100, "echo": True, "logprobs": 1}, openai.BadRequestError, "prompt"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": "5"}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": True}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": WORK // 4 + 1, "n": 4}, openai.BadRequestError, "max_tokens"),
        ({"n": ROWS + QUEUE + 1}, openai.BadRequestError, "n"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"temperature": -0.1}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"logprobs": 21}, openai.BadRequestError, "logprobs"),
        ({"seed": -1}, openai.BadRequestError, "seed"),
        ({"stop": ["a"] * 10_000}, openai.BadRequestError, "stop"),
        ({"stop": ""}, openai.BadRequestError, "stop"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"1": 101}}, openai.BadRequestError, "logit_bias"),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty"),
        ({"frequency_penalty": -0.5}, openai.BadRequestError, "frequency_penalty"),
        ({"best_of": 3}, openai.BadRequestError, "best_of"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix"),
        ({"extra_body": {"tempreature": 1}}, openai.BadRequestError, "tempreature"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_wrong_requests_are_the_client_s_exceptions(client, options, error, param):
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "a", "prompt": "the "} | options)
    assert caught.value.param == param
    assert caught.value.status_code < 500


DEEP = b"[" * 100_000
JUNK = [
    b"", b"{", b"nonsense", b"[]", b"3", b"null", b'"a"', b"\xff\xfe", b'{"model": "\xff"}', b'{"model": "a", "prompt": "\\ud800"}',
    b'{"model": "a", "prompt": ["ok", "\\udfff"]}', b'{"model": "\\ud800"}', b'{"\\ud800": 1, "model": "a"}', b'{"model": "a", "stop": "\\ud800"}',
    b'{"model": "a", "temperature": NaN}', b'{"model": "a", "temperature": Infinity}', b'{"model": "a", "temperature": 1e999}',
    b'{"model": "a", "repetition_penalty": 1e-320}', b'{"model": "a", "max_tokens": ' + b"9" * 5000 + b"}", b'{"model": "a", "logit_bias": {"1": NaN}}',
    DEEP, b'{"model": "a", "prompt": ' + DEEP, b'{"a":' * 50_000, b'{"model": "a", "prompt": [' + b"1," * 200_000 + b"1]}",
    b'{"model": "a", "prompt": ["' + b'","' * 100_000 + b'"]}', b'{"model": "a", "logit_bias": {"-1": 1}}', b'{"model": "a", "logit_bias": {"\xc2\xb2": 1}}',
]  # fmt: skip


@pytest.mark.parametrize("body", JUNK, ids=lambda body: repr(body[:40]))
def test_junk_is_refused_in_the_api_s_shape(server, body):
    status, content = server.post(body)
    assert (400 <= status < 500) or body.startswith(b'{"model": "a", "repetition')
    if status != 200:
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}


def test_who_wants_a_chat_is_told_what_there_is(client):
    with pytest.raises(openai.NotFoundError, match="/v1/completions"):
        client.chat.completions.create(model="a", messages=[{"role": "user", "content": "Hello"}])


def test_a_temperature_of_almost_nothing_and_huge_ones(server):
    for temperature in (1e-300, 1e300, 0):
        assert server.post({"model": "a", "temperature": temperature})[0] == 200


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["a", "b", "the ", "1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.integers(0, 99).map(str), inner, max_size=3),
    max_leaves=6,
)


def fitting(schema, definitions):
    """What the OpenAPI schema of a field allows."""
    if "$ref" in schema:
        inner = definitions[schema["$ref"].rpartition("/")[2]]
        return st.fixed_dictionaries({}, optional={name: fitting(field, definitions) for name, field in inner["properties"].items()})
    if "anyOf" in schema:
        return st.one_of([fitting(one, definitions) for one in schema["anyOf"]])
    kind, low, high = schema.get("type"), schema.get("minimum"), schema.get("maximum")
    return {
        "string": lambda: st.text(min_size=schema.get("minLength", 0), max_size=min(8, schema.get("maxLength", 8))),
        "integer": lambda: st.integers(low or 0, 8),
        "number": lambda: st.floats(low if low is not None else 0.01, high if high is not None else 10, exclude_min="exclusiveMinimum" in schema),
        "boolean": st.booleans,
        "null": st.none,
        "array": lambda: st.lists(fitting(schema["items"], definitions), min_size=schema.get("minItems", 0), max_size=3),
        "object": lambda: st.dictionaries(st.integers(0, 40).map(str), st.floats(-100, 100), max_size=3),
    }[kind]()


SCHEMA = CompletionRequest.model_json_schema()
FIELDS = {name: fitting(field, SCHEMA["$defs"]) for name, field in SCHEMA["properties"].items()}
ASKED = st.fixed_dictionaries({"model": st.just("a")}, optional={name: one | values for name, one in FIELDS.items() if name != "model"})
FITTING = st.fixed_dictionaries({"model": st.just("a")}, optional={name: one for name, one in FIELDS.items() if name != "model"})
FUZZ = settings(max_examples=120, suppress_health_check=list(HealthCheck))


def test_the_schema_is_told(server):
    told = json.loads(server.ask("GET", "/openapi.json")[1])
    assert told["components"]["schemas"]["CompletionRequest"]["properties"].keys() == FIELDS.keys()


@FUZZ
@given(asked=ASKED | values)
def test_no_request_breaks_the_server(server, asked):
    status, content = server.post(asked)
    assert status < 500, content
    if not content.startswith(b"data:"):
        assert "error" in json.loads(content) or json.loads(content)["object"] == "text_completion"


@FUZZ
@given(asked=FITTING)
def test_what_fits_the_schema_is_answered_or_explained(server, asked):
    status, content = server.post(asked)
    if status == 200:
        assert b"[DONE]" in content if asked.get("stream") else json.loads(content)["choices"]
    else:  # what a schema cannot say
        assert json.loads(content)["error"]["param"] in {"best_of", "n", "max_tokens", "prompt"}, content


@contextmanager
def waiting(server, asked):
    """A client that has asked and then does not read; at the end it goes away."""
    body = json.dumps({"model": "a", "prompt": "the "} | asked).encode()
    with socket.create_connection((server.host, server.port)) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        yield sock


def test_a_full_line_says_when_to_come_again(server, client):
    with waiting(server, {"max_tokens": LONG, "n": ROWS, "stream": True}), waiting(server, {"max_tokens": WORK // QUEUE, "n": QUEUE}):
        server.wait_until("nanogpt_active_rows", ROWS)
        server.wait_until("nanogpt_queue_length", QUEUE)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="a", prompt="the ")
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
        client.completions.create(model="b", prompt="the ")  # which has a line of its own
    server.wait_until("nanogpt_active_rows", 0)
    server.wait_until("nanogpt_queue_length", 0)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_place(server, stream):
    with waiting(server, {"max_tokens": LONG, "n": 3, "stream": stream}):
        server.wait_until("nanogpt_active_rows", 3)
    server.wait_until("nanogpt_active_rows", 0)


def test_many_at_once_write_what_each_would_alone(server, client, model):
    """Rows, batches and line are shared by thirty; some go away in the middle."""

    def ask(seed):
        if seed % 5 == 4:
            client.completions.create(model="a", prompt="the ", max_tokens=LONG, stream=True).close()
        asked = client.completions.create(model="a", prompt="the " * (seed % 7), max_tokens=20 + 3 * seed, seed=seed, stream=seed % 2 == 0)
        return "".join(chunk.choices[0].text for chunk in asked) if seed % 2 == 0 else asked.choices[0].text

    with ThreadPoolExecutor(30) as threads:
        texts = list(threads.map(ask, range(30)))
    for seed, text in enumerate(texts):
        assert text == own(model, "the " * (seed % 7) or None, max_tokens=20 + 3 * seed, seed=seed)
    server.wait_until("nanogpt_active_rows", 0)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/models", {"Host": "evil.com"}, 403),
        ("GET", "/v1/models", {"Host": "localhost.evil.com:80"}, 403),
        ("GET", "/v1/models", {"Host": "[::1"}, 403),
        ("GET", "/v1/models", {"Host": "localhost:1"}, 200),  # a port that was forwarded
        ("GET", "/v1/models", {"Host": "[::1]:80"}, 200),
        ("POST", "/v1/completions", {"Host": "localhost:80", "Origin": "http://evil.com"}, 403),
        ("POST", "/v1/completions", {"Host": "localhost:80", "Origin": "null"}, 403),
        ("POST", "/v1/completions", {"Host": "localhost:80", "Origin": "http://localhost:81"}, 403),
        ("POST", "/v1/completions", {"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ("OPTIONS", "/v1/completions", {"Host": "localhost:80", "Origin": "http://evil.com"}, 403),
        ("GET", "/v1/nothing", {}, 404),
        ("DELETE", "/v1/models", {}, 405),
        ("GET", "/healthz", {}, 200),
    ],
)
def test_only_our_own_pages_and_programs_get_in(server, method, path, headers, status):
    body = b'{"model": "a", "max_tokens": 1}' if method == "POST" else None
    found, content = server.ask(method, path, body, {"Content-Type": "application/json"} | headers)
    assert found == status
    assert ("error" in json.loads(content)) == (status != 200)


def test_a_large_body_is_refused_in_pieces_too(server):
    status, content = server.ask("POST", "/v1/completions", iter([b" " * 300_000] * 4), {"Content-Type": "application/json"})
    assert (status, json.loads(content)["error"]["code"]) == (413, "request_too_large")


def resident(process):
    with open(f"/proc/{process.pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat(server):
    def ask(times):
        for i in range(times):
            server.post({"model": "a", "prompt": "the ", "max_tokens": 4, "logprobs": 5, "n": 3, "stream": i % 2 == 0, "stop": ["q"]})

    ask(60)
    before = resident(server.process)
    ask(150)
    assert resident(server.process) - before < 3


def test_a_signal_lets_it_finish_and_a_key_is_asked_for(runs):
    """What is under way is finished, what would take too long ends where it is, and the exit code is 0."""
    with serving(runs / "a", env={"NANOGPT_API_KEY": "a-secret-key"}, before="nanogpt.serve.GRACE = 4") as server:
        assert server.ask("GET", "/healthz")[0] == 200
        for path in ("/v1/models", "/metrics", "/", "/openapi.json"):
            assert server.ask("GET", path)[0] == 401
        assert server.ask("GET", "/v1/models", headers={"Authorization": "Basic OmEtc2VjcmV0LWtleQ=="})[0] == 200  # ":a-secret-key", as browsers send it
        for wrong in ("a-secret-key", "Bearer", "Bearer a-secret-keY", "Basic a-secret-key", "Basic OmE=", "Bearer \xff"):
            assert server.ask("GET", "/v1/models", headers={"Authorization": wrong})[0] == 401
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        client = server.client(api_key="a-secret-key")
        ask = {"model": "a", "prompt": "the ", "stream": True, "stream_options": {"include_usage": True}}
        streams = [client.completions.create(max_tokens=most, **ask) for most in (200, 5 * LONG)]
        server.process.send_signal(signal.SIGTERM)
        short, long = (list(stream)[-2:] for stream in streams)
        assert [end.choices[0].finish_reason for end, _ in (short, long)] == ["length"] * 2
        assert short[1].usage.completion_tokens == 200 < long[1].usage.completion_tokens < 5 * LONG
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.process.stdout.read()
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_an_address_that_is_taken(runs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} already") as caught:
            serve.run(Models(runs, ServeConfig(port=port)))
    words = shlex.split(str(caught.value).splitlines()[1])
    assert words[:4] == ["nanogpt", "serve", str(runs), "--port"]
    assert int(words[4]) != port


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_need_a_key(runs, host):
    with pytest.raises(UserError, match="NANOGPT_API_KEY"):
        serve.run(Models(runs, ServeConfig(host=host)))


def test_a_host_that_is_not_ours(runs):
    with pytest.raises(UserError, match=r"cannot listen at 192\.0\.2\.1"):
        serve.run(Models(runs, ServeConfig(host="192.0.2.1", api_key="a-secret-key", port=0)))


def test_nothing_to_serve(tmp_path):
    with pytest.raises(UserError, match="neither a model nor runs"):
        Models(tmp_path)
    with pytest.raises(UserError, match="no model or folder"):
        Models(tmp_path / "nowhere")


@pytest.fixture
def inside(runs):
    """A server in this process, by its settings; with its models."""

    @contextmanager
    def open_one(path=runs, **options):
        models = Models(path, ServeConfig(**options), PLACE)
        with TestClient(serve.create_app(models), base_url="http://localhost", raise_server_exceptions=False) as client:
            yield client, models

    return open_one


def test_time_ends_a_text_where_it_is(inside):
    with inside(seconds=0.5, rows=1) as (client, _):
        client.post("/v1/completions", json={"model": "a", "max_tokens": 1})
        answer = client.post("/v1/completions", json={"model": "a", "max_tokens": LONG}).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < LONG
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(client.post, "/v1/completions", json={"model": "a", "max_tokens": LONG})
            while not client.app.state.models.workers[0].open:
                time.sleep(0.01)
            second = client.post("/v1/completions", json={"model": "a", "max_tokens": 4, "n": 1})
            assert first.result().status_code == 200
        assert second.status_code in (200, 429)  # it had its turn when the first was over, or none in time


def test_a_model_is_loaded_once(inside, monkeypatch):
    loads, load = [], library.load

    def slow(path, **options):
        loads.append(path.parent.name)
        time.sleep(0.2)
        return load(path, **options)

    monkeypatch.setattr(library, "load", slow)
    with inside() as (client, _), ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(client.post, "/v1/completions", json={"model": name, "max_tokens": 2}) for name in "abababab"]
        assert [one.result().status_code for one in asked] == [200] * 8
    assert sorted(loads) == ["a", "b"]


def test_a_model_that_training_replaced_is_loaded_anew(inside, tmp_path):
    make_run(tmp_path / "run", 0)
    with inside(tmp_path / "run") as (client, models):
        ask = {"model": "run", "prompt": "the ", "seed": 1}
        first = client.post("/v1/completions", json=ask).json()["choices"][0]["text"]
        assert models.names == ["run"]
        make_run(tmp_path / "run", 1)
        new = own(library.load(tmp_path / "run", **PLACE.model_dump()), "the ", seed=1)
        assert client.post("/v1/completions", json=ask).json()["choices"][0]["text"] == new != first


def test_a_damaged_model_is_told_of_and_may_be_mended(inside, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\x00" * 100)
    with inside(tmp_path) as (client, _):
        answer = client.post("/v1/completions", json={"model": "bad"})
        assert (answer.status_code, "damaged" in answer.json()["error"]["message"]) == (400, True)
        make_run(tmp_path / "bad", 0)
        assert client.post("/v1/completions", json={"model": "bad"}).status_code == 200


def test_a_link_that_leads_out_of_the_folder_is_no_model(runs, tmp_path):
    make_run(tmp_path / "served" / "own", 0)
    (tmp_path / "served" / "also").symlink_to(tmp_path / "served" / "own")
    (tmp_path / "served" / "whole").symlink_to(runs / "a")
    (tmp_path / "served" / "file").mkdir()
    (tmp_path / "served" / "file" / "model.safetensors").symlink_to(runs / "b" / "model.safetensors")
    assert Models(tmp_path / "served").names == ["also", "own"]


def test_only_so_many_models_are_kept(inside, tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt.serve.models.LOADED", 2)
    for name in "abc":
        make_run(tmp_path / name, 0)
    with inside(tmp_path) as (client, models):
        for name in "abac":
            assert client.post("/v1/completions", json={"model": name, "max_tokens": 1}).status_code == 200
        assert [worker.name for worker in models.workers] == ["a", "c"]


def test_models_that_take_each_other_s_place_lose_no_request(inside, monkeypatch):
    monkeypatch.setattr("nanogpt.serve.models.LOADED", 1)
    with inside() as (client, _), ThreadPoolExecutor(8) as threads:
        long = "the " * 2500  # which becomes tokens in another thread, while the other model may want the place
        asked = [threads.submit(client.post, "/v1/completions", json={"model": name, "prompt": long, "max_tokens": 2}) for name in "ab" * 20]
        assert {one.result(60).status_code for one in asked} <= {200, 429}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("method", ["add", "step"])
def test_a_failure_of_the_engine_is_a_500_and_passes(inside, monkeypatch, method, stream):
    with inside() as (client, models):
        ask = {"model": "a", "prompt": "the ", "seed": 1, "max_tokens": 4}
        good = client.post("/v1/completions", json=ask).json()["choices"]
        worker = models.workers[0]
        monkeypatch.setattr(worker._engine, method, lambda *_: 1 / 0)
        answer = client.post("/v1/completions", json=ask | {"stream": stream})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert worker.open == 0
        assert client.post("/v1/completions", json=ask).json()["choices"] == good


def test_the_loop_is_not_woken_for_every_token(runs):
    """A text of many tokens comes in a few deliveries."""

    async def write():
        models = Models(runs, ServeConfig(), PLACE)
        worker = await models.open("a")
        request = library.Model.request(worker.model, "the ", seed=1, max_tokens=400)
        batches = [len(made) async for made in worker.submit([request], True, 60).pieces()]
        await models.close()
        return batches

    batches = asyncio.run(write())
    assert sum(batches) == 400
    assert batches[0] == 1  # the first is not held back
    assert len(batches) < 200


def test_counts_are_written_as_prometheus_reads_them():
    metrics = Metrics()
    metrics.count_request("/v1/models", 200)
    metrics.count_request("/v1/models", 200)
    metrics.count_tokens('a"\\\n', "prompt", 3)
    for seconds in (0.001, 0.005, 0.3, 99):
        metrics.first_token.observe(seconds)
    text = metrics.text({"a": 1}, {"a": 2})
    assert text.endswith("\n")
    lines = text.splitlines()
    for line in (
        'nanogpt_requests_total{path="/v1/models",status="200"} 2',
        'nanogpt_tokens_total{model="a\\"\\\\\\n",kind="prompt"} 3',
        'nanogpt_active_rows{model="a"} 1',
        'nanogpt_queue_length{model="a"} 2',
        'nanogpt_time_to_first_token_seconds_bucket{le="0.005"} 2',
        'nanogpt_time_to_first_token_seconds_bucket{le="0.25"} 2',
        'nanogpt_time_to_first_token_seconds_bucket{le="0.5"} 3',
        'nanogpt_time_to_first_token_seconds_bucket{le="+Inf"} 4',
        "nanogpt_time_to_first_token_seconds_count 4",
        "# TYPE nanogpt_time_to_first_token_seconds histogram",
    ):
        assert line in lines


@pytest.mark.skipif(sys.platform != "linux", reason="where connections do not have it from the socket that listens, asyncio may set it")
def test_answers_do_not_wait_for_more_to_fill_a_packet(tmp_path):
    with serve._listen(ServeConfig(port=0), tmp_path) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
