"""The OpenAI-compatible API over real sockets, mostly with OpenAI's own client."""

import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import openai
import pytest
import torch
from helpers import make_run, resident, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanogpt import api
from nanogpt.server.schemas import MAX_WORK, CompletionRequest

BATCH_SIZE, QUEUE_SIZE = 4, 40
# More tokens than any test waits for.
MANY_TOKENS = 100_000


@pytest.fixture(scope="module", autouse=True)
def _shared_cache(measured):
    """Use the session's cache of compiled code in module fixtures too."""
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
    limits = ("--max-batch-size", BATCH_SIZE, "--max-queue", QUEUE_SIZE)
    with serving(runs, *limits, "--deterministic") as server:
        yield server


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def model(runs):
    return api.load(runs / "a", device="cpu", dtype="float32", threads=1)


def generate(model, prompt, **options):
    """Return the text that the library generates."""
    return "".join(model.stream(prompt, **{"temperature": 1.0, "max_tokens": 16} | options))


def choices_of(response, stream):
    """Return the choices of a response, or those of all chunks of a stream."""
    return [chunk.choices[0] for chunk in response] if stream else [response.choices[0]]


def test_completion_equals_library(client, model):
    options = {"max_tokens": 60, "seed": 3, "temperature": 0.7, "top_p": 0.9}
    response = client.completions.create(model="a", prompt="the ", **options)
    assert response.choices[0].text == generate(model, "the ", **options)
    assert response.choices[0].finish_reason == "length"
    assert (response.object, response.model) == ("text_completion", "a")
    usage = response.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 60, 64)


def test_completion_has_openai_defaults(client, model):
    response = client.completions.create(model="a", prompt="the ", seed=5)
    expected = generate(model, "the ", seed=5, max_tokens=16, temperature=1.0)
    assert response.choices[0].text == expected


def test_stream_equals_library(client, model):
    options = {"max_tokens": 300, "seed": 3}
    chunks = list(
        client.completions.create(
            model="a",
            prompt="the ",
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
    )
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.text for choice in choices) == generate(model, "the ", **options)
    reasons = [choice.finish_reason for choice in choices]
    assert reasons == [None] * (len(chunks) - 2) + ["length"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 300)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_arrives_during_generation(client):
    ask = {"model": "a", "prompt": "the ", "max_tokens": MANY_TOKENS}
    with client.completions.create(**ask, stream=True) as stream:
        assert [next(stream).choices[0].finish_reason for _ in range(3)] == [None] * 3


def test_completion_sampling_extensions(client, model):
    options = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5}
    response = client.completions.create(
        model="a", prompt="the ", max_tokens=40, seed=3, extra_body=options
    )
    expected = generate(model, "the ", max_tokens=40, seed=3, **options)
    assert response.choices[0].text == expected


def test_completion_several_prompts_and_sequences(client, model):
    response = client.completions.create(model="a", prompt=["the ", "a dog"], n=2, seed=7)
    expected = [
        generate(model, prompt, seed=seed) for prompt in ("the ", "a dog") for seed in (7, 8)
    ]
    found = [(choice.index, choice.text) for choice in response.choices]
    assert found == list(enumerate(expected))


def test_completion_prompt_of_token_ids(client, model):
    ids = model.tokenizer.encode("the ")
    expected = generate(model, "the ", seed=1)
    single = client.completions.create(model="a", prompt=ids, seed=1)
    assert single.choices[0].text == expected
    double = client.completions.create(model="a", prompt=[ids, ids], seed=1)
    assert [choice.text for choice in double.choices] == [expected] * 2


def test_completion_without_prompt(client, model):
    response = client.completions.create(model="a", prompt="", seed=1, echo=True)
    assert response.choices[0].text == generate(model, None, seed=1)


def test_completion_logit_bias_forces_token(client, model):
    q = model.tokenizer.encode("q")[0]
    response = client.completions.create(model="a", prompt="the ", logit_bias={str(q): 100})
    assert response.choices[0].text == "q" * 16


def expected_logprobs(model, ids):
    """Return the (T - 1, V) log-probabilities, with tokens unseen in training at -inf."""
    logits = torch.tensor(model.logits([ids])[0, :-1]).double()
    for start, stop in model.summary["unseen_token_ranges"]:
        logits[:, start:stop] = -torch.inf
    return logits.log_softmax(dim=1).numpy()


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_equal_model(client, model, stream):
    options = {"max_tokens": 20, "seed": 3, "temperature": 0.5, "top_p": 0.5}
    response = client.completions.create(
        model="a", prompt="the ", logprobs=2, echo=True, stream=stream, **options
    )
    choices = choices_of(response, stream)
    text = "".join(choice.text for choice in choices)
    tokens, logprobs, top_logprobs, offsets = (
        [value for choice in choices for value in getattr(choice.logprobs, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert "".join(tokens) == text == "the " + generate(model, "the ", **options)
    assert offsets == list(range(len(text)))
    ids = model.tokenizer.encode(text)
    expected = expected_logprobs(model, ids)
    assert logprobs[0] is None
    assert top_logprobs[0] is None
    np.testing.assert_allclose(logprobs[1:], expected[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
    for row, top in zip(expected, top_logprobs[1:], strict=True):
        best = np.argsort(-row)[:2]
        assert list(top) == [model.tokenizer.decode([i]) for i in best]
        np.testing.assert_allclose(list(top.values()), row[best], atol=1e-4)


def test_logprobs_of_prompt_alone(client, model):
    response = client.completions.create(
        model="a", prompt="the dog", max_tokens=0, logprobs=0, echo=True
    )
    assert response.choices[0].text == "the dog"
    assert response.choices[0].logprobs.top_logprobs is None
    assert response.usage.completion_tokens == 0
    ids = model.tokenizer.encode("the dog")
    np.testing.assert_allclose(
        response.choices[0].logprobs.token_logprobs[1:],
        expected_logprobs(model, ids)[np.arange(6), ids[1:]],
        atol=1e-4,
    )


def test_logprobs_name_partial_characters_by_bytes(client, model):
    """The prompt is half of a character that never occurred in training."""
    fox = model.tokenizer.encode("🦊")
    assert len(fox) == 4
    response = client.completions.create(
        model="a", prompt=fox[:2], max_tokens=0, echo=True, logprobs=0
    )
    assert response.choices[0].logprobs.tokens == ["bytes:\\xf0", "bytes:\\x9f"]
    assert response.choices[0].logprobs.token_logprobs[1] == -9999.0


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_is_not_returned(client, model, stream):
    options = {"max_tokens": 60, "seed": 3}
    text = generate(model, "the ", **options)
    stop = text[20:23]
    response = client.completions.create(
        model="a", prompt="the ", stop=[stop, "never"], logprobs=0, stream=stream, **options
    )
    choices = choices_of(response, stream)
    expected = text[: text.index(stop)]
    assert "".join(choice.text for choice in choices) == expected
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    assert "".join(tokens) == expected
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
        ({"max_tokens": MAX_WORK // 4 + 1, "n": 4}, openai.BadRequestError, "max_tokens"),
        ({"n": BATCH_SIZE + QUEUE_SIZE + 1}, openai.BadRequestError, "n"),
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
def test_invalid_requests_raise_client_errors(client, options, error, param):
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "a", "prompt": "the "} | options)
    assert caught.value.param == param
    assert caught.value.status_code < 500


DEEP = b"[" * 100_000
MALFORMED = [
    b"",
    b"{",
    b"nonsense",
    b"[]",
    b"3",
    b"null",
    b'"a"',
    b"\xff\xfe",
    b'{"model": "\xff"}',
    b'{"model": "a", "prompt": "\\ud800"}',
    b'{"model": "a", "prompt": ["ok", "\\udfff"]}',
    b'{"model": "\\ud800"}',
    b'{"\\ud800": 1, "model": "a"}',
    b'{"model": "a", "stop": "\\ud800"}',
    b'{"model": "a", "temperature": NaN}',
    b'{"model": "a", "temperature": Infinity}',
    b'{"model": "a", "temperature": 1e999}',
    b'{"model": "a", "repetition_penalty": 1e-320}',
    b'{"model": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"model": "a", "logit_bias": {"1": NaN}}',
    DEEP,
    b'{"model": "a", "prompt": ' + DEEP,
    b'{"a":' * 50_000,
    b'{"model": "a", "prompt": [' + b"1," * 200_000 + b"1]}",
    b'{"model": "a", "prompt": ["' + b'","' * 100_000 + b'"]}',
    b'{"model": "a", "logit_bias": {"-1": 1}}',
    b'{"model": "a", "logit_bias": {"\xc2\xb2": 1}}',
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:40]))
def test_malformed_bodies_get_api_errors(server, body):
    status, content = server.post(body)
    assert (400 <= status < 500) or body.startswith(b'{"model": "a", "repetition')
    if status != 200:
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}


def test_chat_error_names_completions(client):
    with pytest.raises(openai.NotFoundError, match="/v1/completions"):
        client.chat.completions.create(model="a", messages=[{"role": "user", "content": "Hello"}])


def test_extreme_temperatures(server):
    for temperature in (1e-300, 1e300, 0):
        assert server.post({"model": "a", "temperature": temperature})[0] == 200


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["a", "b", "the ", "1"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 99).map(str), inner, max_size=3)
    ),
    max_leaves=6,
)


def valid_values(schema, definitions):
    """Return a strategy for the values that the OpenAPI schema of a field allows."""
    if "$ref" in schema:
        properties = definitions[schema["$ref"].rpartition("/")[2]]["properties"]
        fields = {name: valid_values(field, definitions) for name, field in properties.items()}
        return st.fixed_dictionaries({}, optional=fields)
    if "anyOf" in schema:
        return st.one_of([valid_values(option, definitions) for option in schema["anyOf"]])
    low, high = schema.get("minimum"), schema.get("maximum")
    min_length, max_length = schema.get("minLength", 0), min(8, schema.get("maxLength", 8))
    strategies = {
        "string": lambda: st.text(min_size=min_length, max_size=max_length),
        "integer": lambda: st.integers(low or 0, 8),
        "number": lambda: st.floats(
            low if low is not None else 0.01,
            high if high is not None else 10,
            exclude_min="exclusiveMinimum" in schema,
        ),
        "boolean": st.booleans,
        "null": st.none,
        "array": lambda: st.lists(
            valid_values(schema["items"], definitions),
            min_size=schema.get("minItems", 0),
            max_size=3,
        ),
        "object": lambda: st.dictionaries(
            st.integers(0, 40).map(str), st.floats(-100, 100), max_size=3
        ),
    }
    return strategies[schema.get("type")]()


SCHEMA = CompletionRequest.model_json_schema()
FIELDS = {
    name: valid_values(field, SCHEMA["$defs"]) for name, field in SCHEMA["properties"].items()
}
OPTIONAL = {name: values for name, values in FIELDS.items() if name != "model"}
VALID_REQUESTS = st.fixed_dictionaries({"model": st.just("a")}, optional=OPTIONAL)
ANY_REQUESTS = st.fixed_dictionaries(
    {"model": st.just("a")},
    optional={name: values | json_values for name, values in OPTIONAL.items()},
)
FUZZ = settings(max_examples=120, suppress_health_check=list(HealthCheck))


def test_openapi_schema_has_all_fields(server):
    schemas = json.loads(server.ask("GET", "/openapi.json")[1])["components"]["schemas"]
    assert schemas["CompletionRequest"]["properties"].keys() == FIELDS.keys()


@FUZZ
@given(body=ANY_REQUESTS | json_values)
def test_fuzzed_requests_never_fail_the_server(server, body):
    status, content = server.post(body)
    assert status < 500, content
    if not content.startswith(b"data:"):
        assert "error" in json.loads(content) or json.loads(content)["object"] == "text_completion"


@FUZZ
@given(body=VALID_REQUESTS)
def test_fuzzed_valid_requests_succeed(server, body):
    status, content = server.post(body)
    if status == 200:
        assert b"[DONE]" in content if body.get("stream") else json.loads(content)["choices"]
    else:  # limits that a schema cannot express
        param = json.loads(content)["error"]["param"]
        assert param in {"best_of", "n", "max_tokens", "prompt"}, content


@contextmanager
def unread_request(server, **options):
    """Send a request without reading the response, and disconnect at the end."""
    body = json.dumps({"model": "a", "prompt": "the "} | options).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((server.host, server.port)) as sock:
        sock.sendall(head.encode() + body)
        yield sock


def test_full_queue_returns_retry_after(server, client):
    with (
        unread_request(server, max_tokens=MANY_TOKENS, n=BATCH_SIZE, stream=True),
        unread_request(server, max_tokens=MAX_WORK // QUEUE_SIZE, n=QUEUE_SIZE),
    ):
        server.wait_until("nanogpt_active_rows", BATCH_SIZE)
        server.wait_until("nanogpt_queue_length", QUEUE_SIZE)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="a", prompt="the ")
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
        # Each model has its own queue.
        client.completions.create(model="b", prompt="the ")
    server.wait_until("nanogpt_active_rows", 0)
    server.wait_until("nanogpt_queue_length", 0)


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_rows(server, stream):
    with unread_request(server, max_tokens=MANY_TOKENS, n=3, stream=stream):
        server.wait_until("nanogpt_active_rows", 3)
    server.wait_until("nanogpt_active_rows", 0)


def test_concurrent_completions_equal_library(server, client, model):
    """Thirty clients share rows, batches and queue, and some disconnect early."""

    def ask(seed):
        if seed % 5 == 4:
            client.completions.create(
                model="a", prompt="the ", max_tokens=MANY_TOKENS, stream=True
            ).close()
        stream = seed % 2 == 0
        response = client.completions.create(
            model="a",
            prompt="the " * (seed % 7),
            max_tokens=20 + 3 * seed,
            seed=seed,
            stream=stream,
        )
        return "".join(choice.text for choice in choices_of(response, stream))

    with ThreadPoolExecutor(30) as threads:
        texts = list(threads.map(ask, range(30)))
    for seed, text in enumerate(texts):
        prompt = "the " * (seed % 7) or None
        assert text == generate(model, prompt, max_tokens=20 + 3 * seed, seed=seed)
    server.wait_until("nanogpt_active_rows", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_constant(server):
    body = {"model": "a", "prompt": "the ", "max_tokens": 4, "logprobs": 5, "n": 3, "stop": ["q"]}

    def ask(times):
        for i in range(times):
            server.post(body | {"stream": i % 2 == 0})

    ask(60)
    before = resident(server.process)
    ask(150)
    assert resident(server.process) - before < 3
