"""The page in a real browser, with a small trained model: every tab and hostile input."""

import http.client
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import uvicorn
from helpers import TINY

import nanogpt
from nanogpt.config import DeviceConfig, ServeConfig
from nanogpt.generate.torch_decoder import TorchDecoder
from nanogpt.server import run_reader
from nanogpt.server.app import Server, create_app
from nanogpt.server.model_pool import ModelPool

HOSTILE = "<img src=x onerror=alert(1)>"  # a valid folder name
HOSTILE_TEXT = "</div><script>alert(2)</script><img src=x onerror=alert(3)>"
WORDS = re.findall(
    r"\w+",
    "the a sea ship wind star light dark cold deep salt rope sail crew song night storm wave hand "
    "stone bird sand shore calm",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SMALL = TINY | {"n_embd": 32, "context_length": 32, "steps": 60, "eval_every": 20, "dropout": 0.0}


def random_text(seed, num_words):
    """Return words in random order."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice("  \n") for _ in range(num_words))


@pytest.fixture(scope="module", autouse=True)
def _quick(measured):
    """Use PyTorch's decoder, which needs no compilation, and one cache for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(measured))
        patch.setattr(
            "nanogpt.api.create_decoder",
            lambda model, machine, dtype, rows: TorchDecoder(model, machine, rows),
        )
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, _quick):
    """Train three runs: a plain one, one with hostile text, one with two tokens per character."""
    folder = tmp_path_factory.mktemp("site")
    text, served = folder / "sea.txt", folder / "runs"
    text.write_text(random_text(0, 4000), encoding="utf-8")
    model = nanogpt.train(text, served / "sea", **SMALL)
    (folder / "letters.txt").write_text(
        "".join(random.Random(0).choices("жб ", k=6000)), encoding="utf-8"
    )
    nanogpt.train(
        folder / "letters.txt",
        served / "letters",
        **SMALL | {"tokenizer": "byte", "steps": 300, "eval_every": 300},
    )
    shutil.copytree(served / "sea", served / HOSTILE)
    with (served / HOSTILE / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 60, "text": HOSTILE_TEXT}) + "\n")
    about = json.loads((served / "sea" / "data.json").read_text(encoding="utf-8")) | {
        "sources": [HOSTILE]
    }
    (served / HOSTILE / "data.json").write_text(json.dumps(about), encoding="utf-8")
    os.utime(served / "sea" / "metrics.jsonl")  # the page shows the last written run first
    shutil.copytree(served / "sea", folder / "elsewhere")
    (served / "link").symlink_to(folder / "elsewhere")
    return SimpleNamespace(runs=served, model=model, text=text.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def site(trained):
    """Serve the runs."""
    sock = socket.create_server(("127.0.0.1", 0))
    models = ModelPool(
        trained.runs, ServeConfig(port=0, max_batch_size=4), DeviceConfig(dtype="float32")
    )
    app = create_app(models)
    server = Server(uvicorn.Config(app, log_level="warning"), app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    port = sock.getsockname()[1]
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, **vars(trained))
    server.should_exit = True
    thread.join()
    sock.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of these browsers is installed: {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def opened(browser):
    """Open pages; fail on any error, dialog, or request to another host."""
    contexts, wrong = [], []

    def opened(url, prepare=lambda page: None, **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        host = re.match(r"http://[^/]*", url)[0]
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((f"{host}/", "data:", "blob:"))
                else wrong.append(request.url)
            ),
        )
        page.on(
            "console",
            lambda message: (
                wrong.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        prepare(page)
        page.goto(url)
        return page

    opened.wrong = wrong
    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def expect(browser):
    from playwright.sync_api import expect

    expect.set_options(timeout=20_000)
    return expect


def curve(page):
    """Return the first line's number of points and last step, and the number of lines."""
    return page.evaluate(
        "() => { const { data } = document.querySelector('.chart.large');"
        "return [data[0].x.length, data[0].x.at(-1), data.length]; }"
    )


def test_runs_tab_shows_curves_facts_and_samples(site, opened, expect):
    page = opened(f"{site.url}/")
    expect(page.locator(".chart.large.js-plotly-plot")).to_be_visible()
    expect(page.locator(".run-header h2")).to_have_text("sea")
    assert curve(page) == [60, 60, 2]  # training and validation
    expect(page.locator(".diagnosis")).to_have_text(site.model.summary["diagnosis"]["summary"])
    expect(page.locator(".facts").first).to_contain_text(
        f"{site.model.summary['bits_per_byte']:.3f} bits per byte"
    )
    lines = page.evaluate(
        "document.querySelector('.chart.large').layout.shapes.map((line) => line.y0)"
    )
    # Every character is one byte.
    bits = [nats / math.log(2) for nats in site.model.summary["baselines"].values()]
    assert lines == pytest.approx(bits)

    written = [
        json.loads(line)["text"]
        for line in (site.runs / "sea" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    slider, sample = page.get_by_role("slider"), page.get_by_role("region", name="Sample")
    assert sample.text_content() == written[-1]
    slider.fill("0")
    assert sample.text_content() == written[0] != written[-1]
    assert "step 20" in slider.get_attribute("aria-valuetext")

    page.get_by_label("log y").check()
    page.get_by_role("radio", name="time").click()
    page.get_by_role("button", name=re.compile("img src")).click()
    expect(page.locator(".run-list [aria-pressed=true]")).to_have_count(2)
    page.wait_for_timeout(500)
    assert curve(page)[2] == 4
    assert page.evaluate(
        "(() => { const { yaxis, xaxis } = document.querySelector('.chart.large').layout;"
        "return [yaxis.type, xaxis.title.text]; })()"
    ) == [
        "log",
        "training time",
    ]


def test_runs_tab_without_runs_shows_the_command(site, opened, expect):
    page = opened(
        f"{site.url}/",
        lambda page: page.route("**/page/runs", lambda route: route.fulfill(json=[])),
    )
    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
    expect(page.locator("#runs pre")).to_have_text("nanogpt train book.txt --open")


def generate(page, prompt, **settings):
    page.get_by_role("tab", name="Generate").click()
    page.get_by_label("Prompt").fill(prompt)
    for name, value in settings.items():
        page.locator(f"#setting-{name}").fill(str(value))
    page.locator("#generate .primary").click()


def text_of(page, nth=0):
    return "".join(page.locator("#generate .card").nth(nth).locator("[data-i]").all_text_contents())


def test_generate_tab_streams_and_branches(site, opened, expect):
    page = opened(f"{site.url}/#generate")
    page.locator("#model").select_option("sea")
    generate(page, "the sea", max_tokens=40, seed=5, n=2)
    done = page.locator("#generate .card:not(.is-generating)")
    expect(done).to_have_count(2)
    stream = [
        "".join(site.model.stream("the sea", seed=seed, max_tokens=40, temperature=0.8))
        for seed in (5, 6)
    ]
    assert [text_of(page, 0), text_of(page, 1)] == stream

    card, place = page.locator("#generate .card").first, 10
    card.locator(f"[data-i='{place}']").click()
    likely = page.get_by_role("dialog", name="Alternatives")
    expect(likely).to_be_visible()
    logits = site.model.logits([site.model.tokenizer.encode("the sea" + stream[0][:place])])[0, -1]
    shares = {
        site.model.tokenizer.decode([i]): p
        for i, p in enumerate(softmax(logits, site.model.summary["unseen_token_ranges"]))
        if p
    }
    names = {" ": "space", "\n": "new line"}
    said = {button.get_attribute("aria-label") for button in likely.get_by_role("button").all()}
    for text, share in sorted(shares.items(), key=lambda pair: -pair[1])[:5]:
        percent = f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"
        assert any(words.startswith(f"{names.get(text, text)}, {percent} %") for words in said), (
            text,
            share,
            said,
        )

    other = likely.locator("button:not(.is-chosen)").first
    chosen = {name: sign for sign, name in names.items()}.get(
        other.locator(".token-name").text_content(), other.locator(".token-name").text_content()
    )
    other.click()
    expect(page.locator("#generate .card.is-generating")).to_have_count(0)
    expect(card.locator(".toolbar .text-muted")).to_have_text("40 tokens")
    again = text_of(page)
    assert again[: place + 1] == stream[0][:place] + chosen != stream[0][: place + 1]
    assert again != stream[0]
    assert text_of(page, 1) == stream[1]


def softmax(logits, unused):
    for first, behind in unused:
        logits[first:behind] = -math.inf
    weights = [math.exp(value - max(logits)) for value in logits.tolist()]
    return [weight / sum(weights) for weight in weights]


def test_generate_tab_stops(site, opened, expect):
    page = opened(f"{site.url}/#generate")
    page.locator("#model").select_option("sea")
    generate(page, "the", max_tokens=20000, n=1)
    stop = page.get_by_role("button", name="Stop")
    expect(page.locator("#generate [data-i='20']")).to_be_attached()
    stop.click()
    expect(page.locator("#generate .card .toolbar")).to_contain_text("stopped")
    expect(stop).to_be_hidden()
    assert page.locator("#generate [data-i]").count() < 20000


def test_generate_tab_replaces_a_character_of_two_tokens(site, opened, expect):
    page = opened(f"{site.url}/#generate")
    page.locator("#model").select_option("letters")
    generate(page, "жб ", max_tokens=30, n=1, seed=1, temperature=0.5)
    expect(page.locator("#generate .card:not(.is-generating)")).to_have_count(1)
    before = text_of(page)
    chars = page.locator("#generate [data-i]").all_text_contents()
    place = next(i for i, char in enumerate(chars) if i > 5 and char in ("ж", "б"))
    other = {"ж": "б", "б": "ж"}[chars[place]]
    page.locator(f"#generate [data-i='{place}']").click()
    page.get_by_role("dialog").get_by_role("button", name=re.compile(f"^{other},")).click()
    expect(page.locator("#generate .card:not(.is-generating) .toolbar .text-muted")).to_have_text(
        "30 tokens"
    )
    kept = len("".join(chars[:place]))
    assert text_of(page)[: kept + 1] == before[:kept] + other


def inspect(page, text, view=None):
    page.get_by_role("tab", name="Inspect").click()
    page.locator("#model").select_option("sea")
    page.get_by_label("Text to inspect").fill(text)
    if view:
        page.get_by_role("radio", name=view).click()
    page.locator("#inspect .primary").click()


def test_inspect_tab_shows_surprisal(site, opened, expect):
    text = "the cold sea"
    page = opened(f"{site.url}/#inspect")
    inspect(page, text)
    found = site.model.inspect(text).surprisal()
    expect(page.locator("#inspect .facts")).to_contain_text(
        f"{found.bits_per_byte:.3f} bits per byte"
    )
    expect(page.locator("#inspect .facts")).to_contain_text(f"{found.total_bits:,.0f} bits")
    heats = [
        page.locator(f"#inspect [data-i='{i}']").evaluate(
            "(span) => span.style.getPropertyValue('--heat')"
        )
        for i in range(len(text))
    ]
    assert heats == [f"{math.floor(10 * min(10, bits) + 0.5)}%" for bits in found.bits]
    most = page.locator("#inspect .most button").first
    expect(most).to_contain_text(f"{max(found.bits):.1f} bits")
    most.click()
    dialog = page.get_by_role("dialog", name=f"{max(found.bits):.1f} bits")
    expect(dialog.locator(".is-chosen")).to_have_count(1)


def test_inspect_tab_shows_attention_weights(site, opened, expect):
    text = "the cold sea and a ship"
    page = opened(f"{site.url}/#inspect")
    inspect(page, text, "Attention")
    weights = site.model.inspect(text).attention().weights
    maps = page.get_by_role("radiogroup", name="Layers and heads").get_by_role("radio")
    expect(maps).to_have_count(4)
    maps.and_(page.get_by_label("Layer 1, head 1")).click()
    read = (
        "(map) => [...map.getContext('2d').getImageData(0, 0, map.width, map.height).data]"
        ".filter((_, i) => i % 4 === 3)"
    )
    opacity = page.locator(".map-large").evaluate(read)
    shown = weights[1, 1].ravel()
    assert opacity == pytest.approx((255 * shown**0.5).round().tolist(), abs=1)
    page.locator("#inspect .stage [data-i='9']").click()
    near = page.locator("#inspect .stage [data-i='7']")
    near.hover()
    assert near.get_attribute("title").startswith(
        f"{100 * weights[1, 1, 9, 7]:.{0 if weights[1, 1, 9, 7] >= 0.0995 else 1}f} %"
    )
    assert page.locator(".arcs path").count() == sorted(weights[1, 1, 9, :9], reverse=True)[
        :12
    ].__len__() - sum(w < 0.02 for w in weights[1, 1, 9, :9])


def test_inspect_tab_shows_neurons_and_embedding(site, opened, expect):
    text = "the cold sea"
    page = opened(f"{site.url}/#inspect")
    inspect(page, text, "Neurons")
    expect(page.locator("#inspect .excerpts .tokens")).not_to_have_count(0)
    found = site.model.inspect(text).neurons(0)
    most = max(map(abs, found.activations.tolist()))
    heats = [
        page.locator(f"#inspect .pickable [data-i='{i}']").evaluate(
            "(span) => parseInt(span.style.getPropertyValue('--heat'))"
        )
        for i in range(len(text))
    ]
    assert heats == pytest.approx(
        [100 * abs(value) / most for value in found.activations.tolist()], abs=1
    )
    page.get_by_role("radio", name="Embedding").click()
    expect(page.locator(".chart.map.js-plotly-plot")).to_be_visible()
    points = page.evaluate(
        "(() => { const { x, y } = document.querySelector('.chart.map').data[0];return [x, y]; })()"
    )
    assert points == pytest.approx(site.model.inspect("").embedding().coords.T, abs=1e-5)


def test_memorization_tab_finds_a_planted_copy(site, opened, expect):
    page = opened(f"{site.url}/#memorization")
    page.locator("#model").select_option("sea")
    planted = site.text[1000:1100]
    for text, is_memorized in ((f"Once {planted} and then", True), (random_text(9, 30), False)):
        page.get_by_label("Text to check").fill(text)
        page.locator("#memorization .primary").click()
        expect(page.locator("#memorization .diagnosis")).to_contain_text(
            "Memorized" if is_memorized else "Not above the baseline"
        )
        marks = page.locator("#memorization .passages mark").all_text_contents()
        assert (len(marks) == 1 and planted.strip() in marks[0]) if is_memorized else marks == []


def test_page_shows_hostile_text_as_text(site, opened, expect):
    page = opened(f"{site.url}/")
    page.get_by_role("button", name=re.compile("img src")).click()
    expect(page.locator(".run-header h2")).to_have_text(HOSTILE)
    expect(page.get_by_role("region", name="Sample")).to_have_text(HOSTILE_TEXT)
    expect(page.locator(".run-header .text-muted")).to_contain_text(HOSTILE)
    page.locator(".chart.large").hover()
    inspect(page, HOSTILE_TEXT)
    page.locator("#model").select_option(HOSTILE)
    expect(page.locator("#inspect .tokens")).to_have_text(HOSTILE_TEXT)
    page.get_by_role("tab", name="Memorization").click()
    page.get_by_label("Text to check").fill(HOSTILE_TEXT)
    page.locator("#memorization .primary").click()
    expect(page.locator("#memorization .passages")).to_have_text(HOSTILE_TEXT)
    assert page.locator("main img, main script, header img").count() == 0


def test_page_works_with_the_keyboard(site, opened, expect):
    page = opened(f"{site.url}/")
    page.get_by_role("tab", name="Runs").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Generate")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Generate")).to_be_visible()
    page.keyboard.press("End")
    expect(page.get_by_role("tab", name="Memorization", selected=True)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Runs")).to_be_focused()

    page.get_by_role("tab", name="Generate").click()
    page.locator("#model").select_option("sea")
    page.locator("#setting-n").fill("1")
    page.locator("#setting-max_tokens").fill("30")
    page.get_by_label("Prompt").fill("a ship")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#generate .card:not(.is-generating)")).to_have_count(1)
    before = text_of(page)
    page.locator("#generate [data-i='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Alternatives")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#generate [data-i='1']")).to_be_focused()
    page.keyboard.press("Enter")
    taken = page.locator(".alternatives button").evaluate_all(
        "(buttons) => buttons.findIndex((button) => button.className === 'is-chosen')"
    )
    page.keyboard.press("ArrowDown") if taken == 0 else None
    page.keyboard.press("Enter")
    expect(page.locator("#generate .card:not(.is-generating) .toolbar .text-muted")).to_have_text(
        "30 tokens"
    )
    after = text_of(page)
    assert after[0] == before[0]
    assert after[1] != before[1]
    unnamed = (
        "(all) => all.filter((one) => !(one.labels?.length || one.textContent.trim() "
        "|| one.getAttribute('aria-label'))).length"
    )
    assert page.locator("button, input, select, textarea").evaluate_all(unnamed) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_narrow_windows_in_light_and_dark(site, opened, expect, scheme):
    page = opened(f"{site.url}/", viewport={"width": 340, "height": 700}, color_scheme=scheme)
    expect(page.locator(".chart.large.js-plotly-plot")).to_be_visible()
    for tab in ("Runs", "Generate", "Inspect", "Memorization"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        ), tab
    red, *_ = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    )
    assert red > 230 if scheme == "light" else red < 40


def test_train_open_shows_a_growing_curve(tmp_path, opened, expect):
    text = tmp_path / "sea.txt"
    text.write_text(random_text(1, 3000), encoding="utf-8")
    settings = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in (TINY | {"steps": 100_000, "eval_every": 1000, "dropout": 0}).items()
    ]
    words = [
        sys.executable,
        "-m",
        "nanogpt",
        "train",
        text,
        "--out",
        tmp_path / "runs" / "live",
        *settings,
        "--open",
    ]
    environment = os.environ | {"BROWSER": f"{sys.executable} -c pass %s", "PYTHONUNBUFFERED": "1"}
    training = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        line = next(line for line in training.stdout if line.startswith("Page"))
        url = line.split()[1]
        page = opened(url)
        expect(page.locator(".run-list button")).to_contain_text("training")
        expect(page.locator(".chart.large.js-plotly-plot")).to_be_visible()
        first = curve(page)[1]
        for _ in range(40):
            page.wait_for_timeout(250)
            if curve(page)[1] > first:
                break
        assert curve(page)[1] > first
    finally:
        training.send_signal(signal.SIGINT)
        rest = training.communicate(timeout=60)[0]
    assert "Traceback" not in rest, rest
    assert training.returncode == 130
    expect(page.get_by_role("alert")).to_contain_text("nanogpt serve runs")
    # The stream of events ends with the server, and requests then fail.
    expected = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET")
    assert all(any(name in words for name in expected) for words in opened.wrong)
    opened.wrong.clear()
    host, port = re.match(r"http://(.*):(\d+)", url).groups()
    deadline = time.monotonic() + 10
    with pytest.raises(OSError):  # the server stops with the training
        while time.monotonic() < deadline:
            socket.create_connection((host, int(port)), 1).close()
            time.sleep(0.1)


def ask(site, method, path, body=None, **headers):
    """Return status, headers and body of a request with an unnormalised path."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
    connection.putrequest(method, path)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.putheader("Content-Length", str(len(body or "")))
    connection.endheaders((body or "").encode())
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read().decode()
    connection.close()
    return found


@pytest.mark.parametrize(
    "path",
    [
        "/page/..%2fconfig.py",
        "/page/../config.py",
        "/page/%2e%2e/config.py",
        "/page/..%5cconfig.py",
        "/page//etc/passwd",
        "/page/index.html",
        "/page/runs/../metrics",
        "/page/runs/..%2fruns%2fsea/metrics",
        "/page/runs/%2e%2e/samples",
        "/page/runs/sea/..%2fconfig.toml",
        "/page/runs/sea/config.toml",
        "/page/runs/link/metrics",
        "/page/runs/sea%2fstate/metrics",
        "/page/runs/sea%00/metrics",
    ],
)
def test_dashboard_serves_no_other_file(site, path):
    status, _, body = ask(site, "GET", path)
    assert status == 404
    assert "root:" not in body
    assert "grad_norm" not in body


def test_dashboard_follows_no_links_out_of_the_folder(site, tmp_path):
    names = [run["name"] for run in json.loads(ask(site, "GET", "/page/runs")[2])]
    assert sorted(names) == sorted(["sea", "letters", HOSTILE])
    secret, run = tmp_path / "secret.jsonl", tmp_path / "runs" / "run"
    secret.write_text('{"step": 1, "text": "secret"}\n', encoding="utf-8")
    run.mkdir(parents=True)
    (run / "samples.jsonl").symlink_to(secret)
    assert run_reader.log_path(run, "samples.jsonl") is None


def test_dashboard_content_security_policy(site):
    policy = ask(site, "GET", "/")[1]["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    status, headers, body = ask(site, "GET", "/page/plotly.js")
    assert (status, len(body) > 1_000_000) == (200, True)
    assert ask(site, "GET", "/page/plotly.js", If_None_Match=headers["etag"])[0] == 304


def test_dashboard_refuses_other_origins(site):
    body = json.dumps({"model": "sea", "text": "the"})
    for path in ("/page/inspect/surprisal", "/page/memorization"):
        assert (
            ask(
                site,
                "POST",
                path,
                body,
                Content_Type="application/json",
                Origin="http://evil.example",
            )[0]
            == 403
        )
        assert (
            ask(site, "POST", path, body, Content_Type="application/json", Origin=site.url)[0]
            == 200
        )
        # A form on another site could send plain text without permission.
        assert ask(site, "POST", path, body, Content_Type="text/plain")[0] >= 400


def test_dashboard_inspect_errors_have_messages(site):
    for path, question, said in (
        ("/page/inspect/surprisal", {"model": "none", "text": "a"}, "no model 'none'"),
        ("/page/inspect/surprisal", {"model": "sea", "text": ""}, "the text is empty"),
        ("/page/inspect/neurons", {"model": "sea", "text": "a", "layer": 7}, "no layer 7"),
    ):
        status, _, body = ask(
            site, "POST", path, json.dumps(question), Content_Type="application/json"
        )
        error = json.loads(body)["error"]
        assert (status, error["code"] == "model_not_found") in ((400, False), (404, True))
        assert said in error["message"]
    # Numbers are converted; null is no text.
    for question, expected in (
        ({"model": "sea", "text": "a", "layer": "1"}, 200),
        ({"model": "sea", "text": None}, 400),
    ):
        body = json.dumps(question)
        path = "/page/inspect/neurons"
        status = ask(site, "POST", path, body, Content_Type="application/json")[0]
        assert status == expected


def test_run_reader_returns_new_lines_only(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    step = {
        "seconds": 1.0,
        "tokens": 4,
        "train_loss": 2.5,
        "learning_rate": 0.1,
        "grad_norm": 1.0,
        "tokens_per_second": 9.0,
    }
    path.write_text(
        json.dumps({"step": 1} | step) + "\nnonsense\n[1]\n" + '{"step": 2, "grad_',
        encoding="utf-8",
    )
    first = run_reader.read_new_metrics(path, 0, "")
    assert (first["steps"]["step"], first["from"], first["more"]) == ([1], 0, False)
    # An incomplete line is not returned.
    assert run_reader.read_new_metrics(path, first["offset"], first["file"])["steps"]["step"] == []
    with path.open("a", encoding="utf-8") as file:
        file.write(
            'norm": NaN}\n' + json.dumps({"step": 2, "val_loss": math.inf, "best": True}) + "\n"
        )
    second = run_reader.read_new_metrics(path, first["offset"], first["file"])
    assert (second["steps"]["step"], second["steps"]["grad_norm"]) == ([2], [None])
    assert second["evaluations"] == [{"step": 2, "val_loss": None, "best": True}]
    json.dumps(second, allow_nan=False)

    other = tmp_path / "other"  # resuming replaces the log by a shorter one
    other.write_text(json.dumps({"step": 1} | step) + "\n", encoding="utf-8")
    other.replace(path)
    third = run_reader.read_new_metrics(path, second["offset"], second["file"])
    assert (third["from"], third["steps"]["step"], third["file"] != second["file"]) == (
        0,
        [1],
        True,
    )

    monkeypatch.setattr(run_reader, "MAX_CHUNK_BYTES", 300)
    path.write_text(
        "".join(json.dumps({"step": i} | step) + "\n" for i in range(10)), encoding="utf-8"
    )
    seen, offset, file, more = [], 0, "", True
    while more:
        part = run_reader.read_new_metrics(path, offset, file)
        seen += part["steps"]["step"]
        offset, file, more = part["offset"], part["file"], part["more"]
    assert seen == list(range(10))
