"""The page in a real browser, on a real small model: each tab end to end; what it refuses; and that nothing leaves this machine."""

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
from conftest import TINY

import nanogpt
from nanogpt.config import ServeConfig
from nanogpt.serve import create_app, runs
from nanogpt.serve.models import Models

HOSTILE = "<img src=x onerror=alert(1)>"  # of which a folder may be called
HOSTILE_TEXT = "</div><script>alert(2)</script><img src=x onerror=alert(3)>"
WORDS = re.findall(r"\w+", "the a sea ship wind star light dark cold deep salt rope sail crew song night storm wave hand stone bird sand shore calm")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SMALL = TINY | {"n_embd": 32, "context_length": 32, "steps": 60, "eval_every": 20, "dropout": 0.0}


def babble(seed, words):
    """Words in an order that no other seed has for long."""
    chance = random.Random(seed)
    return "".join(chance.choice(WORDS) + chance.choice("  \n") for _ in range(words))


@pytest.fixture(scope="module")
def site(tmp_path_factory, measured):
    """A server of two runs, one of them with hostile words in it, and of what it must not show."""
    folder = tmp_path_factory.mktemp("site")
    text, served = folder / "sea.txt", folder / "runs"
    text.write_text(babble(0, 4000), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(measured))
        model = nanogpt.train(text, served / "sea", **SMALL)
    shutil.copytree(served / "sea", served / HOSTILE)
    with (served / HOSTILE / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 60, "text": HOSTILE_TEXT}) + "\n")
    with (served / HOSTILE / "text.json").open("r+", encoding="utf-8") as file:
        about = json.load(file) | {"sources": [HOSTILE]}
        file.seek(0)
        json.dump(about, file)
        file.truncate()
    os.utime(served / "sea" / "metrics.jsonl")  # the last written to, which the page shows first
    shutil.copytree(served / "sea", folder / "elsewhere")
    (served / "link").symlink_to(folder / "elsewhere")
    models = Models(served, ServeConfig(port=0, rows=4))
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(models, served), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    port = sock.getsockname()[1]
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, runs=served, model=model, text=text.read_text(encoding="utf-8"))
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
    """Opens pages; after the test, none of them has met an error, opened a dialog, or asked another machine."""
    contexts, wrong = [], []

    def opened(url, prepare=lambda page: None, **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        host = re.match(r"http://[^/]*", url)[0]
        page.on("request", lambda request: None if request.url.startswith((f"{host}/", "data:", "blob:")) else wrong.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
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
    """How many steps the large chart's first line shows, its last one, and how many lines there are."""
    return page.evaluate("() => { const d = document.querySelector('.chart.large').data; return [d[0].x.length, d[0].x.at(-1), d.length]; }")


def test_runs_are_drawn_over_each_other_with_words_and_samples(site, opened, expect):
    page = opened(f"{site.url}/")
    expect(page.locator(".chart.large.js-plotly-plot")).to_be_visible()
    expect(page.locator(".run-header h2")).to_have_text("sea")
    assert curve(page) == [60, 60, 2]  # training and validation
    expect(page.locator(".verdict")).to_have_text(site.model.summary["verdict"]["sentence"])
    expect(page.locator(".facts").first).to_contain_text(f"{site.model.summary['bits_per_byte']:.3f} bits per byte")
    lines = page.evaluate("document.querySelector('.chart.large').layout.shapes.map((line) => line.y0)")
    bits = [nats / math.log(2) for nats in site.model.summary["baselines"].values()]  # of characters of one byte each
    assert lines == pytest.approx(bits)

    written = [json.loads(line)["text"] for line in (site.runs / "sea" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
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
    assert page.evaluate("(() => { const { yaxis, xaxis } = document.querySelector('.chart.large').layout; return [yaxis.type, xaxis.title.text]; })()") == [
        "log",
        "time of training",
    ]


def test_no_runs_is_a_place_to_begin(site, opened, expect):
    page = opened(f"{site.url}/", lambda page: page.route("**/page/runs", lambda route: route.fulfill(json=[])))
    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
    expect(page.locator("#runs pre")).to_have_text("nanogpt train book.txt --open")


def write(page, prompt, **settings):
    page.get_by_role("tab", name="Write").click()
    page.get_by_label("Prompt").fill(prompt)
    for name, value in settings.items():
        page.locator(f"#setting-{name}").fill(str(value))
    page.locator("#write .primary").click()


def text_of(page, nth=0):
    return "".join(page.locator("#write .card").nth(nth).locator("[data-i]").all_text_contents())


def test_text_streams_and_goes_on_from_another_character(site, opened, expect):
    page = opened(f"{site.url}/#write")
    page.locator("#model").select_option("sea")
    write(page, "the sea", max_tokens=40, seed=5, n=2)
    done = page.locator("#write .card:not(.writing)")
    expect(done).to_have_count(2)
    stream = ["".join(site.model.stream("the sea", seed=seed, max_tokens=40, temperature=0.8)) for seed in (5, 6)]
    assert [text_of(page, 0), text_of(page, 1)] == stream

    card, place = page.locator("#write .card").first, 10
    card.locator(f"[data-i='{place}']").click()
    likely = page.get_by_role("dialog", name="Likely here")
    expect(likely).to_be_visible()
    logits = site.model.logits([site.model.tokenizer.encode("the sea" + stream[0][:place])])[0, -1]
    shares = {site.model.tokenizer.decode([i]): p for i, p in enumerate(softmax(logits, site.model.summary["unused"])) if p}
    names = {" ": "space", "\n": "new line"}
    said = {button.get_attribute("aria-label") for button in likely.get_by_role("button").all()}
    for text, share in sorted(shares.items(), key=lambda pair: -pair[1])[:5]:
        percent = f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"
        assert any(words.startswith(f"{names.get(text, text)}, {percent} %") for words in said), (text, share, said)

    other = likely.locator("button:not(.taken)").first
    chosen = {name: sign for sign, name in names.items()}.get(other.locator(".token-name").text_content(), other.locator(".token-name").text_content())
    other.click()
    expect(page.locator("#write .card.writing")).to_have_count(0)
    expect(card.locator(".toolbar .quiet")).to_have_text("40 tokens")
    again = text_of(page)
    assert again[: place + 1] == stream[0][:place] + chosen != stream[0][: place + 1]
    assert again != stream[0]
    assert text_of(page, 1) == stream[1]


def softmax(logits, unused):
    for first, behind in unused:
        logits[first:behind] = -math.inf
    weights = [math.exp(value - max(logits)) for value in logits.tolist()]
    return [weight / sum(weights) for weight in weights]


def test_writing_stops_when_asked_to(site, opened, expect):
    page = opened(f"{site.url}/#write")
    page.locator("#model").select_option("sea")
    write(page, "the", max_tokens=20000, n=1)
    stop = page.get_by_role("button", name="Stop")
    expect(page.locator("#write [data-i='20']")).to_be_attached()
    stop.click()
    expect(page.locator("#write .card .toolbar")).to_contain_text("stopped")
    expect(stop).to_be_hidden()
    assert page.locator("#write [data-i]").count() < 20000


def look(page, text, view=None):
    page.get_by_role("tab", name="Look").click()
    page.locator("#model").select_option("sea")
    page.get_by_label("A text to read").fill(text)
    if view:
        page.get_by_role("radio", name=view).click()
    page.locator("#look .primary").click()


def test_surprise_is_the_models(site, opened, expect):
    text = "the cold sea"
    page = opened(f"{site.url}/#look")
    look(page, text)
    found = site.model.look(text).surprise()
    expect(page.locator("#look .facts")).to_contain_text(f"{found.bits_per_byte:.3f} bits per byte")
    expect(page.locator("#look .facts")).to_contain_text(f"{found.total_bits:,.0f} bits")
    heats = [page.locator(f"#look [data-i='{i}']").evaluate("(span) => span.style.getPropertyValue('--heat')") for i in range(len(text))]
    assert heats == [f"{math.floor(10 * min(10, bits) + 0.5)}%" for bits in found.bits]
    most = page.locator("#look .most button").first
    expect(most).to_contain_text(f"{max(found.bits):.1f} bits")
    most.click()
    expect(page.get_by_role("dialog", name=f"{max(found.bits):.1f} bits")).to_contain_text("here")


def test_attention_maps_show_the_models_weights(site, opened, expect):
    text = "the cold sea and a ship"
    page = opened(f"{site.url}/#look")
    look(page, text, "Attention")
    weights = site.model.look(text).attention().weights
    maps = page.get_by_role("radiogroup", name="Layers and heads").get_by_role("radio")
    expect(maps).to_have_count(4)
    maps.and_(page.get_by_label("Layer 1, head 1")).click()
    read = "(map) => [...map.getContext('2d').getImageData(0, 0, map.width, map.height).data].filter((_, i) => i % 4 === 3)"
    opacity = page.locator(".map-large").evaluate(read)
    shown = weights[1, 1].ravel()
    assert opacity == pytest.approx((255 * shown**0.5).round().tolist(), abs=1)
    page.locator("#look .stage [data-i='9']").click()
    near = page.locator("#look .stage [data-i='7']")
    near.hover()
    assert near.get_attribute("title").startswith(f"{100 * weights[1, 1, 9, 7]:.{0 if weights[1, 1, 9, 7] >= 0.0995 else 1}f} %")
    assert page.locator(".arcs path").count() == sorted(weights[1, 1, 9, :9], reverse=True)[:12].__len__() - sum(w < 0.02 for w in weights[1, 1, 9, :9])


def test_neurons_and_the_alphabet(site, opened, expect):
    text = "the cold sea"
    page = opened(f"{site.url}/#look")
    look(page, text, "Neurons")
    expect(page.locator("#look .excerpts .tokens")).not_to_have_count(0)
    found = site.model.look(text).neurons(0)
    most = max(map(abs, found.activations.tolist()))
    heats = [page.locator(f"#look .pickable [data-i='{i}']").evaluate("(span) => parseInt(span.style.getPropertyValue('--heat'))") for i in range(len(text))]
    assert heats == pytest.approx([100 * abs(value) / most for value in found.activations.tolist()], abs=1)
    page.get_by_role("radio", name="Alphabet").click()
    expect(page.locator(".chart.map.js-plotly-plot")).to_be_visible()
    points = page.evaluate("(() => { const { x, y } = document.querySelector('.chart.map').data[0]; return [x, y]; })()")
    assert points == pytest.approx(site.model.look("").embedding().xy.T, abs=1e-5)


def test_a_planted_copy_is_found_and_fresh_text_is_not(site, opened, expect):
    page = opened(f"{site.url}/#copies")
    page.locator("#model").select_option("sea")
    planted = site.text[1000:1100]
    for text, recites in ((f"Once {planted} and then", True), (babble(9, 30), False)):
        page.get_by_label("A text to check").fill(text)
        page.locator("#copies .primary").click()
        expect(page.locator("#copies .verdict")).to_contain_text("It recites" if recites else "No more than fresh text")
        marks = page.locator("#copies .passages mark").all_text_contents()
        assert (len(marks) == 1 and planted.strip() in marks[0]) if recites else marks == []


def test_hostile_words_stay_words(site, opened, expect):
    page = opened(f"{site.url}/")
    page.get_by_role("button", name=re.compile("img src")).click()
    expect(page.locator(".run-header h2")).to_have_text(HOSTILE)
    expect(page.get_by_role("region", name="Sample")).to_have_text(HOSTILE_TEXT)
    expect(page.locator(".run-header .quiet")).to_contain_text(HOSTILE)
    page.locator(".chart.large").hover()
    look(page, HOSTILE_TEXT)
    page.locator("#model").select_option(HOSTILE)
    expect(page.locator("#look .tokens")).to_have_text(HOSTILE_TEXT)
    page.get_by_role("tab", name="Copies").click()
    page.get_by_label("A text to check").fill(HOSTILE_TEXT)
    page.locator("#copies .primary").click()
    expect(page.locator("#copies .passages")).to_have_text(HOSTILE_TEXT)
    assert page.locator("main img, main script, header img").count() == 0


def test_the_keyboard_is_enough(site, opened, expect):
    page = opened(f"{site.url}/")
    page.get_by_role("tab", name="Runs").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Write")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Write")).to_be_visible()
    page.keyboard.press("End")
    expect(page.get_by_role("tab", name="Copies", selected=True)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Runs")).to_be_focused()

    page.get_by_role("tab", name="Write").click()
    page.locator("#model").select_option("sea")
    page.locator("#setting-n").fill("1")
    page.locator("#setting-max_tokens").fill("30")
    page.get_by_label("Prompt").fill("a ship")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#write .card:not(.writing)")).to_have_count(1)
    before = text_of(page)
    page.locator("#write [data-i='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Likely here")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#write [data-i='1']")).to_be_focused()
    page.keyboard.press("Enter")
    taken = page.locator(".likely button").evaluate_all("(buttons) => buttons.findIndex((button) => button.className === 'taken')")
    page.keyboard.press("ArrowDown") if taken == 0 else None
    page.keyboard.press("Enter")
    expect(page.locator("#write .card:not(.writing) .toolbar .quiet")).to_have_text("30 tokens")
    after = text_of(page)
    assert after[0] == before[0]
    assert after[1] != before[1]
    unnamed = "(all) => all.filter((one) => !(one.labels?.length || one.textContent.trim() || one.getAttribute('aria-label'))).length"
    assert page.locator("button, input, select, textarea").evaluate_all(unnamed) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_windows_in_light_and_dark(site, opened, expect, scheme):
    page = opened(f"{site.url}/", viewport={"width": 340, "height": 700}, color_scheme=scheme)
    expect(page.locator(".chart.large.js-plotly-plot")).to_be_visible()
    for tab in ("Runs", "Write", "Look", "Copies"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), tab
    red, *_ = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert red > 230 if scheme == "light" else red < 40


def test_a_curve_grows_while_its_training_goes_on(tmp_path, opened, expect):
    text = tmp_path / "sea.txt"
    text.write_text(babble(1, 3000), encoding="utf-8")
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in (TINY | {"steps": 100_000, "eval_every": 1000, "dropout": 0}).items()]
    words = [sys.executable, "-m", "nanogpt", "train", text, "--out", tmp_path / "runs" / "live", *settings, "--open"]
    environment = os.environ | {"BROWSER": f"{sys.executable} -c pass %s", "PYTHONUNBUFFERED": "1"}
    training = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        line = next(line for line in training.stdout if line.startswith("Page"))
        url = line.split()[1]
        page = opened(url)
        expect(page.locator(".run-list button")).to_contain_text("training now")
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
    assert all("ERR_CONNECTION_REFUSED" in words for words in opened.wrong)
    opened.wrong.clear()
    host, port = re.match(r"http://(.*):(\d+)", url).groups()
    deadline = time.monotonic() + 10
    with pytest.raises(OSError):  # the page ends with it
        while time.monotonic() < deadline:
            socket.create_connection((host, int(port)), 1).close()
            time.sleep(0.1)


def ask(site, method, path, body=None, **headers):
    """Status, headers and body of a request whose path goes out as it stands."""
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
        "/page/..%2fconfig.py", "/page/../config.py", "/page/%2e%2e/config.py", "/page/..%5cconfig.py", "/page//etc/passwd", "/page/index.html",
        "/page/runs/../metrics", "/page/runs/..%2fruns%2fsea/metrics", "/page/runs/%2e%2e/samples", "/page/runs/sea/..%2fconfig.toml",
        "/page/runs/sea/config.toml", "/page/runs/link/metrics", "/page/runs/sea%2fstate/metrics", "/page/runs/sea%00/metrics",
    ],
)  # fmt: skip
def test_no_other_file_can_be_read(site, path):
    status, _, body = ask(site, "GET", path)
    assert status == 404
    assert "root:" not in body
    assert "grad_norm" not in body


def test_links_out_of_the_folder_are_not_followed(site, tmp_path):
    names = [run["name"] for run in json.loads(ask(site, "GET", "/page/runs")[2])]
    assert sorted(names) == sorted(["sea", HOSTILE])
    secret, run = tmp_path / "secret.jsonl", tmp_path / "runs" / "run"
    secret.write_text('{"step": 1, "text": "secret"}\n', encoding="utf-8")
    run.mkdir(parents=True)
    (run / "samples.jsonl").symlink_to(secret)
    assert runs.log(run, "samples.jsonl") is None


def test_the_policy_lets_nothing_in_from_elsewhere(site):
    policy = ask(site, "GET", "/")[1]["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    status, headers, body = ask(site, "GET", "/page/plotly.js")
    assert (status, len(body) > 1_000_000) == (200, True)
    assert ask(site, "GET", "/page/plotly.js", If_None_Match=headers["etag"])[0] == 304


def test_other_origins_cannot_ask_for_anything(site):
    body = json.dumps({"model": "sea", "text": "the"})
    for path in ("/page/look/surprise", "/page/copies"):
        assert ask(site, "POST", path, body, Content_Type="application/json", Origin="http://evil.example")[0] == 403
        assert ask(site, "POST", path, body, Content_Type="application/json", Origin=site.url)[0] == 200
        assert ask(site, "POST", path, body, Content_Type="text/plain")[0] >= 400  # which a form elsewhere could send unasked


def test_what_cannot_be_looked_at_is_said_in_words(site):
    for path, question, said in (
        ("/page/look/surprise", {"model": "none", "text": "a"}, "no model 'none'"),
        ("/page/look/surprise", {"model": "sea", "text": ""}, "the text is empty"),
        ("/page/look/neurons", {"model": "sea", "text": "a", "layer": 7}, "no layer 7"),
    ):
        status, _, body = ask(site, "POST", path, json.dumps(question), Content_Type="application/json")
        assert status in (400, 404)
        assert said in json.loads(body)["error"]["message"]


def test_a_log_is_told_line_by_line_as_it_grows(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    step = {"seconds": 1.0, "tokens": 4, "train_loss": 2.5, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 9.0}
    path.write_text(json.dumps({"step": 1} | step) + "\nnonsense\n[1]\n" + '{"step": 2, "grad_', encoding="utf-8")
    first = runs.metrics(path, 0, "")
    assert (first["steps"]["step"], first["from"], first["more"]) == ([1], 0, False)
    assert runs.metrics(path, first["offset"], first["file"])["steps"]["step"] == []  # half a line is none yet
    with path.open("a", encoding="utf-8") as file:
        file.write('norm": NaN}\n' + json.dumps({"step": 2, "val_loss": math.inf, "best": True}) + "\n")
    second = runs.metrics(path, first["offset"], first["file"])
    assert (second["steps"]["step"], second["steps"]["grad_norm"]) == ([2], [None])
    assert second["evaluations"] == [{"step": 2, "val_loss": None, "best": True}]
    json.dumps(second, allow_nan=False)

    other = tmp_path / "other"  # as when a run is resumed: its log is replaced by a shorter one
    other.write_text(json.dumps({"step": 1} | step) + "\n", encoding="utf-8")
    other.replace(path)
    third = runs.metrics(path, second["offset"], second["file"])
    assert (third["from"], third["steps"]["step"], third["file"] != second["file"]) == (0, [1], True)

    monkeypatch.setattr(runs, "PART", 300)
    path.write_text("".join(json.dumps({"step": i} | step) + "\n" for i in range(10)), encoding="utf-8")
    seen, offset, file, more = [], 0, "", True
    while more:
        news = runs.metrics(path, offset, file)
        seen += news["steps"]["step"]
        offset, file, more = news["offset"], news["file"], news["more"]
    assert seen == list(range(10))
