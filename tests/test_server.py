"""The server around the API: security, start and shutdown, the model pool, the engine, metrics."""

import asyncio
import json
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
from helpers import make_run, serving
from starlette.testclient import TestClient

from nanogpt import api
from nanogpt.api import Model
from nanogpt.config import DeviceConfig, ServeConfig
from nanogpt.errors import UserError
from nanogpt.server import app
from nanogpt.server.metrics import Metrics
from nanogpt.server.model_pool import ModelPool

# More tokens than any test waits for.
MANY_TOKENS = 100_000
DEVICE = DeviceConfig(device="cpu", dtype="float32", threads=1)


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
    with serving(runs) as server:
        yield server


@pytest.fixture
def open_server(runs):
    """Return a context manager for a server in this process: its client and its models."""

    @contextmanager
    def open_server(path=runs, **options):
        models = ModelPool(path, ServeConfig(**options), DEVICE)
        with TestClient(
            app.create_app(models), base_url="http://localhost", raise_server_exceptions=False
        ) as client:
            yield client, models

    return open_server


def complete(client, model, **options):
    return client.post("/v1/completions", json={"model": model} | options)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/models", {"Host": "evil.com"}, 403),
        ("GET", "/v1/models", {"Host": "localhost.evil.com:80"}, 403),
        ("GET", "/v1/models", {"Host": "[::1"}, 403),
        ("GET", "/v1/models", {"Host": "localhost:1"}, 200),  # a forwarded port
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
def test_security_rejects_foreign_hosts_and_origins(server, method, path, headers, status):
    body = b'{"model": "a", "max_tokens": 1}' if method == "POST" else None
    found, content = server.ask(method, path, body, {"Content-Type": "application/json"} | headers)
    assert found == status
    assert ("error" in json.loads(content)) == (status != 200)


def test_security_limits_chunked_bodies(server):
    status, content = server.ask(
        "POST", "/v1/completions", iter([b" " * 300_000] * 4), {"Content-Type": "application/json"}
    )
    assert (status, json.loads(content)["error"]["code"]) == (413, "request_too_large")


def test_api_key_and_graceful_shutdown(runs):
    """SIGTERM lets short sequences finish, ends long ones early, and the exit code is 0."""
    before = "nanogpt.server.app.SHUTDOWN_GRACE = 4"
    with serving(runs / "a", env={"NANOGPT_API_KEY": "a-secret-key"}, before=before) as server:
        assert server.ask("GET", "/healthz")[0] == 200
        for path in ("/v1/models", "/metrics", "/", "/openapi.json"):
            assert server.ask("GET", path)[0] == 401

        def status_with(authorization):
            return server.ask("GET", "/v1/models", headers={"Authorization": authorization})[0]

        # Browsers send the password as base64 of ":a-secret-key".
        assert status_with("Basic OmEtc2VjcmV0LWtleQ==") == 200
        wrong = ["a-secret-key", "Bearer", "Bearer a-secret-keY", "Basic a-secret-key"]
        for authorization in (*wrong, "Basic OmE=", "Bearer \xff"):
            assert status_with(authorization) == 401
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        client = server.client(api_key="a-secret-key")
        ask = {"model": "a", "prompt": "the ", "stream_options": {"include_usage": True}}
        streams = [
            client.completions.create(max_tokens=max_tokens, stream=True, **ask)
            for max_tokens in (200, 5 * MANY_TOKENS)
        ]
        server.process.send_signal(signal.SIGTERM)
        short, long = (list(stream)[-2:] for stream in streams)
        assert [end.choices[0].finish_reason for end, _ in (short, long)] == ["length"] * 2
        assert short[1].usage.completion_tokens == 200
        assert 200 < long[1].usage.completion_tokens < 5 * MANY_TOKENS
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.process.stdout.read()
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_stopping_is_set_before_connections_close(runs):
    """Streams without an end can watch the event, and so do not delay the shutdown."""

    async def scenario():
        application = app.create_app(ModelPool(runs, ServeConfig(), DEVICE))
        stopped = asyncio.Event()

        @application.get("/endless")
        async def endless():
            await application.state.stopping.wait()
            stopped.set()

        config = app.uvicorn.Config(application, log_level="error", timeout_graceful_shutdown=60)
        server = app.Server(config, application)
        with app.listen(ServeConfig(port=0)) as sock:
            serving = asyncio.create_task(server.serve(sockets=[sock]))
            _, writer = await asyncio.open_connection(*sock.getsockname())
            writer.write(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not server.server_state.tasks:
                await asyncio.sleep(0.01)
            assert not stopped.is_set()
            server.should_exit = True
            await asyncio.wait_for(serving, 30)
            writer.close()
        assert stopped.is_set()

    asyncio.run(scenario())


def test_run_address_in_use(runs):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"in use: 127.0.0.1, port {port}") as caught:
            app.run(ModelPool(runs, ServeConfig(port=port)))
    assert caught.value.fix.keys() == {"port"}
    assert caught.value.fix["port"] not in (0, port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_run_needs_api_key_for_other_machines(runs, host):
    with pytest.raises(UserError, match="NANOGPT_API_KEY"):
        app.run(ModelPool(runs, ServeConfig(host=host)))


def test_run_foreign_address(runs):
    with pytest.raises(UserError, match=r"Cannot listen on 192\.0\.2\.1"):
        app.run(ModelPool(runs, ServeConfig(host="192.0.2.1", api_key="a-secret-key", port=0)))


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="elsewhere, accepted connections may not inherit the option, and asyncio may set it",
)
def test_listen_disables_nagle():
    with (
        app.listen(ServeConfig(port=0)) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_timeout_ends_sequences_early(open_server):
    with open_server(timeout=0.5, max_batch_size=1) as (client, models):
        # On a busy machine, loading the model may take longer than a request may.
        while complete(client, "a", max_tokens=1).status_code in (408, 429):
            pass
        response = complete(client, "a", max_tokens=MANY_TOKENS).json()
        assert response["choices"][0]["finish_reason"] == "length"
        assert 0 < response["usage"]["completion_tokens"] < MANY_TOKENS
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(complete, client, "a", max_tokens=MANY_TOKENS)
            while not models.engines["a"].in_flight:
                time.sleep(0.01)
            second = complete(client, "a", max_tokens=4, n=1)
            assert first.result().status_code == 200
        # The second one either ran after the first, or timed out in the queue.
        assert second.status_code in (200, 429)


def test_pool_nothing_to_serve(tmp_path):
    with pytest.raises(UserError, match="neither a model nor runs"):
        ModelPool(tmp_path)
    with pytest.raises(UserError, match="no model or folder"):
        ModelPool(tmp_path / "nowhere")


def test_pool_loads_each_model_once(open_server, monkeypatch):
    loaded, load = [], api.load

    def slow_load(path, **options):
        loaded.append(path.parent.name)
        time.sleep(0.2)
        return load(path, **options)

    monkeypatch.setattr(api, "load", slow_load)
    with open_server() as (client, _), ThreadPoolExecutor(8) as threads:
        pending = [threads.submit(complete, client, name, max_tokens=2) for name in "abababab"]
        assert [response.result().status_code for response in pending] == [200] * 8
    assert sorted(loaded) == ["a", "b"]


def test_pool_reloads_changed_model(open_server, tmp_path):
    run = tmp_path / "run"
    make_run(run, 0)
    with open_server(run) as (client, models):
        options = {"prompt": "the ", "seed": 1, "max_tokens": 16, "temperature": 1.0}
        first = complete(client, "run", **options).json()["choices"][0]["text"]
        assert list(models.files()) == ["run"]
        make_run(run, 1)
        expected = "".join(api.load(run, **DEVICE.model_dump()).stream(**options))
        second = complete(client, "run", **options).json()["choices"][0]["text"]
        assert second == expected != first


def test_pool_recovers_from_damaged_model(open_server, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\x00" * 100)
    with open_server(tmp_path) as (client, _):
        response = complete(client, "bad")
        assert response.status_code == 400
        assert "damaged" in response.json()["error"]["message"]
        make_run(tmp_path / "bad", 0)
        assert complete(client, "bad").status_code == 200


def test_pool_ignores_links_out_of_the_folder(runs, tmp_path):
    served = tmp_path / "served"
    make_run(served / "own", 0)
    (served / "also").symlink_to(served / "own")
    (served / "outside").symlink_to(runs / "a")
    (served / "file").mkdir()
    (served / "file" / "model.safetensors").symlink_to(runs / "b" / "model.safetensors")
    assert list(ModelPool(served).files()) == ["also", "own"]


def test_pool_evicts_least_recently_used(open_server, tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt.server.model_pool.MAX_LOADED", 2)
    for name in "abc":
        make_run(tmp_path / name, 0)
    with open_server(tmp_path) as (client, models):
        for name in "abac":
            assert complete(client, name, max_tokens=1).status_code == 200
        assert list(models.engines) == ["a", "c"]


def test_pool_eviction_loses_no_request(open_server, monkeypatch):
    monkeypatch.setattr("nanogpt.server.model_pool.MAX_LOADED", 1)
    with open_server() as (client, _), ThreadPoolExecutor(8) as threads:
        # Encoded in another thread, while the other model may evict this one.
        options = {"prompt": "the " * 2500, "max_tokens": 2}
        pending = [threads.submit(complete, client, name, **options) for name in "ab" * 20]
        assert {response.result(60).status_code for response in pending} <= {200, 429}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("method", ["add", "step"])
def test_engine_recovers_from_failure(open_server, monkeypatch, method, stream):
    with open_server() as (client, models):
        options = {"prompt": "the ", "seed": 1, "max_tokens": 4}
        expected = complete(client, "a", **options).json()["choices"]
        with monkeypatch.context() as patch:
            patch.setattr(f"nanogpt.generate.engine.Engine.{method}", lambda *_: 1 / 0)
            response = complete(client, "a", **options, stream=stream)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert models.engines["a"].in_flight == 0
        assert complete(client, "a", **options).json()["choices"] == expected


def test_engine_delivers_tokens_in_batches(runs):
    """The event loop is woken for far fewer deliveries than tokens."""

    async def generate():
        models = ModelPool(runs, ServeConfig(), DEVICE)
        engine = await models.get_engine("a")
        request = Model.make_request(engine.model, "the ", seed=1, max_tokens=400)
        job = engine.submit([request], True)
        sizes = [len(outputs) async for outputs in job.stream()]
        await models.close()
        return sizes

    sizes = asyncio.run(generate())
    assert sum(sizes) == 400
    assert sizes[0] == 1  # The first token is not delayed.
    assert len(sizes) < 200


def test_metrics_text_format():
    metrics = Metrics()
    metrics.count_request("/v1/models", 200)
    metrics.count_request("/v1/models", 200)
    metrics.count_tokens('a"\\\n', "prompt", 3)
    for seconds in (0.001, 0.005, 0.3, 99):
        metrics.first_token.observe(seconds)
    # An undecodable byte of a folder's name.
    metrics.render({"gone": 1}, {})
    text = metrics.render({"a": 1, "\udcff": 1}, {"a": 2}).decode()
    assert text.endswith("\n")
    assert "gone" not in text
    assert "_created" not in text
    lines = text.splitlines()
    for line in (
        'nanogpt_requests_total{path="/v1/models",status="200"} 2.0',
        'nanogpt_tokens_total{kind="prompt",model="a\\"\\\\\\n"} 3.0',
        'nanogpt_active_rows{model="a"} 1.0',
        'nanogpt_queue_length{model="a"} 2.0',
        'nanogpt_time_to_first_token_seconds_bucket{le="0.005"} 2.0',
        'nanogpt_time_to_first_token_seconds_bucket{le="0.25"} 2.0',
        'nanogpt_time_to_first_token_seconds_bucket{le="0.5"} 3.0',
        'nanogpt_time_to_first_token_seconds_bucket{le="+Inf"} 4.0',
        "nanogpt_time_to_first_token_seconds_count 4.0",
        "# TYPE nanogpt_time_to_first_token_seconds histogram",
    ):
        assert line in lines
