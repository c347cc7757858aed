"""The commands of `nanogpt`, with their flags and their output.

Each command imports its modules when it is called, so that `nanogpt --help` answers at once.
"""

import json
import math
import re
import shlex
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from nanogpt import __version__
from nanogpt.cli import args
from nanogpt.config import Config, DataConfig, DeviceConfig, SamplingConfig, ServeConfig, flatten
from nanogpt.errors import UserError

if TYPE_CHECKING:
    from nanogpt.api import EvalResult

Settings = Annotated[Config, Parameter(name="*")]
DeviceSettings = Annotated[DeviceConfig, Parameter(name="*", group="Device")]
DataSettings = Annotated[DataConfig, Parameter(name="*", group="Data")]
SamplingSettings = Annotated[SamplingConfig, Parameter(name="*", group="Sampling")]
ServerSettings = Annotated[ServeConfig, Parameter(name="*", group="Server")]
PlanTargetFlags = Annotated[args.PlanTarget, Parameter(name="*")]
Flag = Annotated[bool, Parameter(negative="")]
JsonFlag = Annotated[bool, Parameter(name="--json", negative="")]
OpenFlag = Annotated[bool, Parameter(name="--open", negative="")]
LeadingHyphenStr = Annotated[str, Parameter(allow_leading_hyphen=True)]
TrackerNames = Annotated[tuple[str, ...], Parameter(negative="")]
TextArgs = Annotated[
    str,
    Parameter(
        help="Files, folders, globs, - for standard input, or a built-in text: "
        "python, python-docs, shakespeare."
    ),
]

app = App(
    name="nanogpt",
    version=__version__,
    help="Train a GPT on your own text, on the machine you have.",
    exit_on_error=False,
    print_error=False,
)


@app.command
def train(
    *text: TextArgs,
    out: Path | None = None,
    config: Path | None = None,
    preset: str | None = None,
    init_from: Path | None = None,
    resume: Flag = False,
    overwrite: Flag = False,
    open_page: OpenFlag = False,
    track: TrackerNames = (),
    settings: Settings = Config(),
) -> None:
    """Train a model on a text. Ctrl-C saves and stops.

    Args:
        text: The training text.
        out: The run folder. [default: runs/NAME, after the text]
        config: A TOML file of settings, such as another run's config.toml; flags override it.
        preset: A named configuration: nano, gpt2, gpt2-medium, gpt2-large or gpt2-xl.
        init_from: A run folder or model file to start from; its shape and tokenizer stay.
        resume: Resume the run in the folder from its last state; no text is needed.
        overwrite: Replace the run in the folder.
        open_page: Open a page in the browser that shows the run while it trains.
        track: Also log to tensorboard, trackio or wandb (repeatable; no account, no network).
        settings: The settings of the run.
    """
    started_at = time.monotonic()
    from nanogpt.api import train as run_training
    from nanogpt.render.terminal import Terminal
    from nanogpt.training import events

    if out is None and not text:
        raise UserError(
            "No text to train on.", "nanogpt train TEXT, or nanogpt train --resume --out RUN."
        )
    run = out or Path("runs") / args.default_run_name(text[0])
    terminal = Terminal()
    with ExitStack() as stack:
        stack.callback(terminal.close)

        def on_event(event: events.Event) -> None:
            terminal(event)
            # The run folder exists from this event on.
            if open_page and isinstance(event, events.TrainStart):
                from nanogpt.server.background_dashboard import dashboard_process

                stack.enter_context(
                    dashboard_process(run, lambda url: terminal.console.print(f"Page     {url}/"))
                )

        run_training(
            text,
            run,
            config=config,
            preset=preset,
            init_from=init_from,
            resume=resume,
            overwrite=overwrite,
            track=track,
            start_time=started_at,
            on_event=on_event,
            **flatten(settings, explicit=True),
        )
    if open_page:
        runs = shlex.quote(str(run.parent))
        print(f"The page closed with the run. Open it again: nanogpt serve {runs}")


@app.command
def sample(
    model: Path,
    /,
    *,
    prompt: LeadingHyphenStr | None = None,
    prompt_file: LeadingHyphenStr | None = None,
    encoding: str | None = None,
    num_samples: int = 1,
    seed: int | None = None,
    error_on_unknown: Flag = False,
    as_json: JsonFlag = False,
    sampling: SamplingSettings = SamplingConfig(),
    device: DeviceSettings = DeviceConfig(),
) -> None:
    """Generate text. At a terminal without a prompt, prompts are read interactively.

    Args:
        model: A run folder or a model file.
        prompt: The text to continue. [default: start a new text]
        prompt_file: A file that holds the prompt; - for standard input.
        encoding: Encoding of the prompt file.
        num_samples: Number of samples.
        seed: Random seed; sample i uses seed + i. [default: a new one each time]
        error_on_unknown: Refuse prompts with characters that the training text lacks.
        as_json: Print one JSON object.
        sampling: The sampling settings.
        device: The device settings.
    """
    from nanogpt import api
    from nanogpt.cli import interactive

    if num_samples < 1:
        raise UserError(f"--num-samples is too small: {num_samples}.", "Use 1 or more.")
    if prompt is not None and prompt_file is not None:
        raise UserError("Both --prompt and --prompt-file were given.", "Leave one of them out.")
    if prompt_file is not None:
        prompt = args.read_prompt_file(prompt_file, encoding)
    loaded = api.load(model, **device.model_dump(exclude_unset=True))
    if loaded.startup_notice and sys.stderr.isatty():
        print(f"nanogpt: {loaded.startup_notice}", file=sys.stderr)
    if prompt is None and not as_json and sys.stdin.isatty() and sys.stdout.isatty():
        return interactive.chat_loop(loaded, num_samples, seed, error_on_unknown, sampling)
    args.restore_sigpipe()
    first_seed = api.new_seed() if seed is None else seed
    if seed is None and not as_json:
        print(f"seed {first_seed}; repeat with --seed {first_seed}", file=sys.stderr)
    requests = interactive.make_requests(
        loaded, prompt, num_samples, first_seed, error_on_unknown, sampling
    )
    write = interactive.print_json if as_json else interactive.stream_to_stdout
    write(loaded, prompt or "", requests)


@app.command(name="eval")
def evaluate(
    model: Path,
    /,
    *text: str,
    context_length: int | None = None,
    encoding: str | None = None,
    text_field: str | None = None,
    by_position: Flag = False,
    as_json: JsonFlag = False,
    device: DeviceSettings = DeviceConfig(),
) -> None:
    """Measure a model's loss on a text, next to n-gram baselines.

    Args:
        model: A run folder or a model file.
        text: The text to evaluate. [default: the validation split of the model's run]
        context_length: Maximum context in tokens. [default: the model's]
        encoding: Encoding of the text files.
        text_field: Field or column that holds the text of a table. [default: as in the run]
        by_position: Also print the loss by position in the context.
        as_json: Print one JSON object.
        device: The device settings.
    """
    from nanogpt import api
    from nanogpt.render import terminal

    args.restore_sigpipe()
    loaded = api.load(model, **device.model_dump(exclude_unset=True))
    result = loaded.evaluate(
        *text,
        context_length=context_length,
        encoding=encoding,
        text_field=text_field,
        by_position=by_position,
    )
    if as_json:
        print(json.dumps(_eval_json(result, by_position)))
        return
    terminal.show_evaluation(result, result.baselines, result.diagnosis, str(model))
    if by_position:
        terminal.show_by_position(result.by_position)


def _eval_json(result: "EvalResult", by_position: bool) -> dict[str, Any]:
    perplexity = result.word_perplexity
    fields: dict[str, Any] = {
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "word_perplexity": perplexity if math.isfinite(perplexity) else None,
        "tokens": result.tokens,
        "baselines": result.baselines,
        "diagnosis": result.diagnosis.asdict() if result.diagnosis else None,
    }
    if by_position:
        fields["loss_by_position"] = [asdict(bucket) for bucket in result.by_position]
    return fields


@app.command
def inspect(
    model: Path,
    file: str | None = None,
    /,
    *,
    text: LeadingHyphenStr | None = None,
    encoding: str | None = None,
    surprisal: Flag = False,
    attention: Flag = False,
    neurons: Flag = False,
    memorization: Flag = False,
    layer: int | None = None,
    neuron: int | None = None,
    as_json: JsonFlag = False,
    html: Path | None = None,
    device: DeviceSettings = DeviceConfig(),
) -> None:
    """Inspect a model on a text: surprisal, attention, neurons or memorized passages.

    Args:
        model: A run folder or a model file.
        file: A file that holds the text; - for standard input.
        text: The text itself, instead of a file.
        encoding: Encoding of the file.
        surprisal: Surprisal of each token, in bits. This is the default view.
        attention: Attention weights of each head.
        neurons: Activations of the feed-forward neurons of one layer.
        memorization: Passages that occur verbatim in the training text, against a baseline.
        layer: Layer of the neurons, from 0. [default: 0]
        neuron: Index of one neuron, from 0. [default: the one that varies most on the text]
        as_json: Print one JSON object.
        html: Also write the view to this self-contained HTML file.
        device: The device settings.
    """
    from nanogpt import api
    from nanogpt.files import write_text
    from nanogpt.formatting import sanitize
    from nanogpt.render import inspection_html, inspection_terminal, terminal

    view = args.select_view(
        surprisal=surprisal, attention=attention, neurons=neurons, memorization=memorization
    )
    if (layer is not None or neuron is not None) and not neurons:
        raise UserError("--layer and --neuron select a neuron.", "Use them with --neurons.")
    loaded = api.load(model, **device.model_dump(exclude_unset=True))
    inspector = loaded.inspect(args.read_text_argument(file, text, encoding))
    if neurons:
        result = inspector.neurons(layer or 0, neuron, n_excerpts=5)
    else:
        result = getattr(inspector, view)()
    if html is not None:
        fragment = getattr(inspection_html, view)(result)
        write_text(html, inspection_html.page(f"{view.capitalize()}: {model}", fragment))
    args.restore_sigpipe()
    if as_json:
        print(json.dumps(result.asdict(), ensure_ascii=False))
        return
    clean = sanitize if sys.stdout.isatty() else str
    terminal.PlainConsole().print(getattr(inspection_terminal, view)(result, clean))


@app.command
def serve(
    model: Path = Path("runs"),
    /,
    *,
    server: ServerSettings = ServeConfig(),
    device: DeviceSettings = DeviceConfig(),
) -> None:
    """Serve the page and an OpenAI-compatible API.

    Args:
        model: A run folder or model file; or a folder of runs, loaded on demand.
        server: The server settings.
        device: The device settings.
    """
    from nanogpt.server.app import run
    from nanogpt.server.model_pool import ModelPool

    pool = ModelPool(model, server, device)
    if pool.single_model is not None:  # compiling its decoder may take half a minute
        print(f"Model    loading {pool.single_model}", flush=True)
    needs_key = server.api_key is not None
    run(pool, on_ready=lambda url: _show_server(url, list(pool.files()), needs_key))


@app.command
def compare(*run: Path, as_json: JsonFlag = False, plot: Path | None = None) -> None:
    """Compare runs: the settings that differ and the results; seeds as mean and deviation.

    Args:
        run: Run folders.
        as_json: Print one JSON object.
        plot: Also write the loss curves to this self-contained HTML file.
    """
    from nanogpt import compare
    from nanogpt.files import write_text
    from nanogpt.render import comparison

    result = compare.compare(run)
    if plot is not None:
        write_text(plot, comparison.plot(result))
    args.restore_sigpipe()
    if as_json:
        print(json.dumps(result.asdict()))
    else:
        print(comparison.table(result, shutil.get_terminal_size().columns), end="")


@app.command
def prepare(
    *text: TextArgs,
    out: Path,
    shard: str = "1/1",
    as_json: JsonFlag = False,
    settings: DataSettings = DataConfig(),
) -> None:
    """Tokenize a large text once, in one or many processes; then nanogpt train OUT.

    Args:
        text: The text to tokenize.
        out: The folder for the tokens; an interrupted process resumes there.
        shard: Process part i of n, as i/n. Processes that share the folder complete it
            together. After runs on separate machines, copy all files into one folder and
            run the command once more without this flag.
        as_json: Print one JSON object.
        settings: The data settings.
    """
    from nanogpt.data.prepare import prepare_folder

    part = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard)
    if not part:
        raise UserError(
            f"--shard is not of the form i/n: {shard}.",
            "For example, use --shard 1/2 in one process and --shard 2/2 in the other.",
        )
    if not text:
        raise UserError("No text to prepare.", "nanogpt prepare TEXT --out FOLDER.")
    result = prepare_folder(text, settings, out, (int(part[1]), int(part[2])))
    if as_json:
        content = {"missing_units": result} if isinstance(result, list) else result.metadata
        print(json.dumps(content))
    elif isinstance(result, list):
        units = "unit of another part is" if len(result) == 1 else "units of other parts are"
        print(f"This part is complete. {len(result):,} {units} still missing in {out}.")
    else:
        data = result.metadata
        num_bytes = data["train_bytes"] + data["val_bytes"]
        print(
            f"{num_bytes:,} bytes in {data['num_documents']:,} documents: "
            f"{data['train_tokens']:,} training tokens, {data['val_tokens']:,} validation tokens; "
            f"{data['split_description']}."
        )
        print(f"Train on it: nanogpt train {shlex.quote(str(out))}")


@app.command
def plan(
    *,
    preset: str | None = None,
    target: PlanTargetFlags = args.PlanTarget(),
    as_json: JsonFlag = False,
    settings: Settings = Config(),
) -> None:
    """Estimate a run's parameters, memory, FLOPs, communication, time and cost.

    Without --vocab-size, assumes 65 characters, or the default vocabulary of word and bpe.

    Args:
        preset: A named configuration, as for train.
        target: The text and the machines.
        as_json: Print one JSON object.
        settings: The settings of the run.
    """
    from nanogpt.cli.plan_command import make_plan
    from nanogpt.render.plan_table import table

    result = make_plan(settings, preset, target)
    print(json.dumps(result.asdict()) if as_json else table(result))


@app.command
def bench(*, as_json: JsonFlag = False, settings: Settings = Config()) -> None:
    """Measure training and decoding throughput on this machine, in about 30 s.

    Args:
        as_json: Print one JSON object.
        settings: The settings of the model and its training.
    """
    from nanogpt.bench import bench
    from nanogpt.render import terminal

    if not as_json:
        print(
            "Measuring for about 30 s; longer if the compiler runs for the first time.",
            file=sys.stderr,
            flush=True,
        )
    speed = bench(flatten(settings, explicit=True))
    args.restore_sigpipe()
    if as_json:
        print(json.dumps(asdict(speed)))
    else:
        terminal.show_speed(speed)


def _show_server(url: str, names: list[str], needs_key: bool) -> None:
    request = {"model": names[0] if names else "NAME", "prompt": "Once upon", "max_tokens": 100}
    body = shlex.quote(json.dumps(request, ensure_ascii=False))
    key = ' -H "Authorization: Bearer $NANOGPT_API_KEY"' if needs_key else ""
    print(f"Page     {url}/")
    print(f"API      {url}/v1 ({len(names)} model{'s' * (len(names) != 1)})")
    print(f"Try it   curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d {body}")
    print("Ctrl-C stops the server after the requests in progress.", flush=True)
