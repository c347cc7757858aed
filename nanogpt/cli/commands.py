"""A table of commands: what each takes, and whom it asks.

In: words that cyclopts has read. Out: what a command prints. What a command needs is imported when it is called.
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
from typing import Annotated

from cyclopts import App, Parameter

import nanogpt
from nanogpt.cli.words import end_quietly_with_the_reader, name_of_run, prompt_in, text_itself
from nanogpt.config import Config, PlaceConfig, SamplingConfig, ServeConfig, TextConfig, flatten
from nanogpt.errors import UserError

Settings = Annotated[Config, Parameter(name="*")]
PlaceSettings = Annotated[PlaceConfig, Parameter(name="*", group="Machine")]
TextSettings = Annotated[TextConfig, Parameter(name="*", group="Text")]
SamplingSettings = Annotated[SamplingConfig, Parameter(name="*", group="Sampling")]
ServerSettings = Annotated[ServeConfig, Parameter(name="*", group="Server")]
Switch = Annotated[bool, Parameter(negative="")]
Words = Annotated[str, Parameter(allow_leading_hyphen=True)]  # which may begin with a dash
Texts = Annotated[str, Parameter(help="Files, folders, globs, - for standard input, or a built-in text: python, python-docs, shakespeare.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="")]

app = App(name="nanogpt", version=nanogpt.__version__, help="Train a GPT on your own text, on the machine you have.", exit_on_error=False, print_error=False)


@app.command
def train(
    *text: Texts, out: Path | None = None, config: Path | None = None, preset: str | None = None, init_from: Path | None = None,
    resume: Switch = False, overwrite: Switch = False, open_page: Annotated[bool, Parameter(name="--open", negative="")] = False,
    track: Annotated[tuple[str, ...], Parameter(negative="")] = (), settings: Settings = Config(),
) -> None:  # fmt: skip
    """Train a model on a text; watch it learn. Ctrl-C saves and stops.

    Parameters
    ----------
    out
        The run folder. [default: runs/NAME, by the name of the text]
    config
        A TOML file of settings, such as the config.toml of another run; flags override it.
    preset
        Settings known by a name: classic (the seed's recipe), gpt2, gpt2-medium, gpt2-large, gpt2-xl; modern and modern-gpt2 are as large.
    init_from
        A run folder or a model file to go on from, on this text: its shape and its tokens stay; only a modern model can look back on more than before.
    resume
        Go on with the run in the folder, exactly where it was saved; it needs no text.
    overwrite
        Replace the run in the folder.
    open_page
        Open a page in the browser that shows the run while it goes on, and the runs beside it.
    track
        Give the numbers to a tracker too: tensorboard, trackio or wandb, without account or network; may be given more than once.
    """
    begun = time.monotonic()
    from nanogpt import library, report

    terminal = report.Terminal()
    if out is None and not text:
        raise UserError("Which text?", "nanogpt train TEXT, or nanogpt train --resume --out RUN.")
    run = out or Path("runs") / name_of_run(text[0])
    with ExitStack() as stack:
        stack.callback(terminal.close)

        def tell(event: report.Event) -> None:
            terminal(event)
            if open_page and isinstance(event, report.Started):  # the folder is there now
                from nanogpt.serve.beside import page_beside

                stack.enter_context(page_beside(run, lambda url: terminal.console.print(f"Page     {url}/")))

        library.train(
            text, run, config=config, preset=preset, init_from=init_from, resume=resume, overwrite=overwrite, track=track, begun=begun, on_event=tell,
            **flatten(settings, explicit=True),
        )  # fmt: skip
    if open_page:
        print(f"The page has ended with the training. To see it again: nanogpt serve {shlex.quote(str(run.parent))}")


@app.command
def sample(
    model: Path, /, *, prompt: Words | None = None, prompt_file: Words | None = None, encoding: str | None = None,
    n: int = 1, seed: int | None = None, strict: Switch = False,
    as_json: AsJson = False, sampling: SamplingSettings = SamplingConfig(), machine: PlaceSettings = PlaceConfig(),
) -> None:  # fmt: skip
    """Let a model write; the text streams as it is made. At a terminal, without a prompt, it asks for prompts, and settings can be changed between them.

    Parameters
    ----------
    model
        A run folder or a model file.
    prompt
        What to continue. [default: the beginning of a text]
    prompt_file
        A file that holds the prompt; - for standard input.
    encoding
        Encoding of the prompt file.
    n
        How many texts.
    seed
        Same seed, same text; the second text has the next seed, and so on. [default: a new one each time]
    strict
        Stop at characters that the training text did not have.
    as_json
        One JSON object instead of text.
    """
    from nanogpt import library
    from nanogpt import sample as texts

    if n < 1:
        raise UserError(f"--n {n} asks for no text.", "Use --n 1 or more.")
    if prompt is not None and prompt_file is not None:
        raise UserError("Both --prompt and --prompt-file were given.", "Leave one of them out.")
    if prompt_file is not None:
        prompt = prompt_in(prompt_file, encoding)
    loaded = library.load(model, **machine.model_dump(exclude_unset=True))
    if loaded.remark and sys.stderr.isatty():
        print(f"nanogpt: {loaded.remark}", file=sys.stderr)
    if prompt is None and not as_json and sys.stdin.isatty() and sys.stdout.isatty():
        return texts.converse(loaded, n, seed, strict, sampling)
    end_quietly_with_the_reader()
    first = library.new_seed() if seed is None else seed
    if seed is None and not as_json:
        print(f"--seed {first}", file=sys.stderr)
    requests = texts.requests_for(loaded, prompt, n, first, strict, sampling)
    (texts.print_json if as_json else texts.print_texts)(loaded, prompt or "", requests)


@app.command(name="eval")
def evaluate(
    model: Path, /, *text: str, context_length: int | None = None, encoding: str | None = None, field: str | None = None, by_position: Switch = False,
    as_json: AsJson = False, machine: PlaceSettings = PlaceConfig(),
) -> None:  # fmt: skip
    """Measure a model on a text, next to n-gram baselines.

    Parameters
    ----------
    model
        A run folder or a model file.
    text
        What to measure it on. [default: the validation split of its own run]
    context_length
        Look back on fewer tokens than the model can.
    encoding
        Encoding of the text files.
    field
        Field of a JSONL file, or column of a CSV or Parquet table, that holds the text. [default: as in the model's run]
    by_position
        Also the loss by how far into its context a token stands, which shows whether a longer context helps.
    as_json
        One JSON object instead of a table.
    """
    from nanogpt import library, report

    end_quietly_with_the_reader()
    result = library.load(model, **machine.model_dump(exclude_unset=True)).evaluate(
        *text, context_length=context_length, encoding=encoding, field=field, by_position=by_position
    )
    if as_json:
        numbers = {"val_loss": result.val_loss, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens, "baselines": result.baselines}
        if by_position:
            numbers["loss_by_position"] = [asdict(bucket) for bucket in result.by_position]
        numbers["word_perplexity"] = result.word_perplexity if math.isfinite(result.word_perplexity) else None
        print(json.dumps(numbers | {"verdict": result.verdict.asdict() if result.verdict else None}))
    else:
        report.show_evaluation(result, result.baselines, result.verdict, str(model))
        if by_position:
            report.show_by_position(result.by_position)


@app.command
def look(
    model: Path, file: str | None = None, /, *, text: Words | None = None, encoding: str | None = None,
    surprise: Switch = False, attention: Switch = False, neurons: Switch = False, copies: Switch = False, layer: int | None = None, neuron: int | None = None,
    as_json: AsJson = False, html: Path | None = None, machine: PlaceSettings = PlaceConfig(),
) -> None:  # fmt: skip
    """Look at a text with a model's eyes: what surprises it, where it looks, what its neurons do; and what of the text it may have by heart.

    Parameters
    ----------
    model
        A run folder or a model file.
    file
        The text to look at: a file, or - for standard input.
    text
        The text itself, instead of a file.
    encoding
        Encoding of the file.
    surprise
        How many bits each token costs the model; this is what is shown where nothing else is asked for.
    attention
        Where each head of each layer looks.
    neurons
        What the feed-forward neurons of a layer respond to.
    copies
        The passages that stand verbatim in the training text, next to what fresh text shows.
    layer
        Layer of the neurons, counted from 0. [default: the first]
    neuron
        Number of one neuron, counted from 0. [default: the one that varies most on this text]
    as_json
        One JSON object instead of a picture.
    html
        Write the picture to this HTML file too; it needs no network.
    """
    from rich.console import Console

    from nanogpt import library, report
    from nanogpt.files import write_text
    from nanogpt.look import html as page
    from nanogpt.look import terminal

    asked = [name for name, yes in {"surprise": surprise, "attention": attention, "neurons": neurons, "copies": copies}.items() if yes] or ["surprise"]
    if len(asked) > 1:
        raise UserError(f"{', '.join(f'--{name}' for name in asked)}: these are {len(asked)} pictures.", "Ask for one at a time.")
    if (layer is not None or neuron is not None) and not neurons:
        raise UserError("--layer and --neuron say which neuron to look at.", "Use them with --neurons.")
    seen = library.load(model, **machine.model_dump(exclude_unset=True)).look(text_itself(file, text, encoding))
    found = seen.neurons(layer or 0, neuron, n_excerpts=5) if neurons else getattr(seen, asked[0])()
    if html is not None:
        write_text(html, page.page(f"{asked[0].capitalize()}: {model}", getattr(page, asked[0])(found)))
    end_quietly_with_the_reader()
    if as_json:
        print(json.dumps(found.asdict(), ensure_ascii=False))
    else:
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        console.print(getattr(terminal, asked[0])(found, report.printable if sys.stdout.isatty() else str))


@app.command
def serve(
    model: Path = Path("runs"), /, *, server: ServerSettings = ServeConfig(), machine: PlaceSettings = PlaceConfig(),
) -> None:  # fmt: skip
    """Serve models: a page to look at runs and to write with them, and the OpenAI-compatible API for programs.

    Parameters
    ----------
    model
        A run folder or a model file; or a folder of runs, whose models are loaded when they are asked for.
    """
    from nanogpt.serve import run
    from nanogpt.serve.models import Models

    models = Models(model, server, machine)
    if models.only is not None:
        print(f"Model    {models.only}, which is being loaded", flush=True)  # its decoder may have to be compiled first
    run(models, model, on_ready=lambda url: _show_server(url, models.names, server.api_key is not None))


@app.command
def compare(*run: Path, as_json: AsJson = False, plot: Path | None = None) -> None:
    """Lay runs side by side: the settings that differ, and what came of them; over seeds the mean with its spread.

    Parameters
    ----------
    run
        Run folders.
    as_json
        One JSON object instead of a table.
    plot
        Write the curves to this HTML file, over time or over tokens; it needs no network.
    """
    from nanogpt import compare as side_by_side
    from nanogpt.files import write_text

    found = side_by_side.compare(run)
    if plot is not None:
        write_text(plot, side_by_side.plot(found))
    end_quietly_with_the_reader()
    print(json.dumps(found.asdict()) if as_json else side_by_side.table(found, shutil.get_terminal_size().columns), end="\n" if as_json else "")


@app.command
def prepare(
    *text: Texts, out: Path, shard: str = "1/1", as_json: AsJson = False, settings: TextSettings = TextConfig(),
) -> None:  # fmt: skip
    """Make the tokens of a large text once, in one process or many; then nanogpt train OUT.

    Parameters
    ----------
    out
        The folder for them. A process that was ended goes on there.
    shard
        Do the i-th of n parts of the work, as i/n. The last to end, of processes that share the folder, completes it; of folders on several machines, copy all
        files into one and run the command once more without this.
    as_json
        One JSON object instead of lines.
    """
    from nanogpt.prepare import prepare_folder

    parts = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard)
    if not parts:
        raise UserError(f"--shard {shard} is not like i/n.", "Use --shard 1/2 in one process and --shard 2/2 in the other, for example.")
    if not text:
        raise UserError("Which text?", "nanogpt prepare TEXT --out FOLDER.")
    done = prepare_folder(text, settings, out, (int(parts[1]), int(parts[2])))
    if as_json:
        print(json.dumps({"missing_units": done} if isinstance(done, list) else done.about))
    elif isinstance(done, list):
        are = "unit of other parts is" if len(done) == 1 else "units of other parts are"
        print(f"This part is done. {len(done):,} {are} still missing in {out}.")
    else:
        about = done.about
        print(f"{about['train_bytes'] + about['val_bytes']:,} bytes in {about['documents']:,} documents: {about['train_tokens']:,} tokens to train on, "
              f"{about['val_tokens']:,} to validate on; {about['split']}.\nTrain on it: nanogpt train {shlex.quote(str(out))}")  # fmt: skip


@app.command
def plan(
    *, preset: str | None = None, text_bytes: int | None = None, gpu: str | None = None, gpus_per_node: int = 1, nodes: int = 1,
    network: float | None = None, price: float | None = None, as_json: AsJson = False, settings: Settings = Config(),
) -> None:  # fmt: skip
    """Say what a run would take: parameters, memory, arithmetic, exchange, time and cost; here, or on GPUs that are not here.

    Without --vocab-size, of 65 letters and signs, or of as many tokens as word and bpe would get.

    Parameters
    ----------
    preset
        Settings known by a name, as for train.
    text_bytes
        Size of the text: what preparing it takes, and how often it is read.
    gpu
        A GPU by name, such as H100 or RTX 4090. [default: this machine]
    gpus_per_node
        GPUs in each machine.
    nodes
        Machines.
    network
        Gigabits a second that go out of each machine. [default: as in NVIDIA's own servers, or 100]
    price
        What a GPU costs for an hour, in any money.
    as_json
        One JSON object instead of a table.
    """
    from nanogpt.cli.foresee import foresee
    from nanogpt.plan.table import table

    found = foresee(settings, preset, text_bytes, gpu, gpus_per_node, nodes, network, price)
    print(json.dumps(found.asdict()) if as_json else table(found))


@app.command
def bench(*, as_json: AsJson = False, settings: Settings = Config()) -> None:
    """Measure how fast this machine trains and writes, with any settings, in about half a minute.

    Parameters
    ----------
    as_json
        One JSON object instead of lines.
    """
    from nanogpt import report
    from nanogpt.bench import bench

    if not as_json:
        print("Measuring, for about half a minute; longer where the compiler runs for the first time.", file=sys.stderr, flush=True)
    found = bench(flatten(settings, explicit=True))
    print(json.dumps(asdict(found))) if as_json else report.show_speed(found)


def _show_server(url: str, names: list[str], needs_key: bool) -> None:
    """Where the server is, and how a program asks it."""
    body = shlex.quote(json.dumps({"model": names[0] if names else "NAME", "prompt": "Once upon", "max_tokens": 100}, ensure_ascii=False))
    key = ' -H "Authorization: Bearer $NANOGPT_API_KEY"' if needs_key else ""
    print(f"Page     {url}/\nAPI      {url}/v1 ({len(names)} model{'s' * (len(names) != 1)})")
    print(f"Try it   curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d {body}")
    print("Ctrl-C ends it, when what is under way has finished.", flush=True)
