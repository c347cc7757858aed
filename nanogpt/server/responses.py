"""Responses to completion requests, built from the engine's outputs.

Source: OpenAI, "API reference", the completion object; WHATWG HTML, 9.2, server-sent events.
"""

import codecs
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nanogpt.server.async_engine import GenerationJob, IndexedOutputs
from nanogpt.server.schemas import CompletionRequest, internal_error, to_json
from nanogpt.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanogpt.api import Model
    from nanogpt.generate.sequence import StepOutput

# Stands for minus infinity, which JSON cannot represent.
MIN_LOGPROB = -9999.0


@dataclass(frozen=True)
class TokenLogprobs:
    """A token with its log-probability and the most probable alternatives.

    The first token of a prompt is not predicted, so its log-probability is None.
    """

    token_id: int
    logprob: float | None
    top_logprobs: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Prompt:
    """A prompt, with `logprobs` of its tokens if the request wants them echoed."""

    ids: list[int]
    text: str
    logprobs: Sequence[TokenLogprobs] = ()


class Choice:
    """One sequence of a response, as it grows.

    Args:
        index: Index in the response.
        prompt: The prompt that it continues.
        tokenizer: The model's tokenizer.
        request: The request that it belongs to.
    """

    def __init__(
        self, index: int, prompt: Prompt, tokenizer: Tokenizer, request: CompletionRequest
    ):
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._logprobs = request.logprobs
        self._pending_text = prompt.text if request.echo else ""
        # Characters of prompt and generated text.
        self._text_length = len(prompt.text)
        # Decodes the bytes of the tokens, to find the character at which each token starts.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoded_length = 0 if request.echo else len(prompt.text)
        # Tokens not yet returned, with the offsets of their first characters.
        self._pending_tokens: list[tuple[TokenLogprobs, int]] = []
        for token in prompt.logprobs:
            self._add_token(token)

    def add(self, output: "StepOutput") -> None:
        """Append an output of the engine."""
        self._pending_text += output.text
        self._text_length += len(output.text)
        if output.token_id is not None:
            self.num_tokens += 1
            if self._logprobs is not None:
                token = TokenLogprobs(output.token_id, output.logprob, output.top_logprobs)
                self._add_token(token)
        if output.finish_reason is not None:
            # The API has no reason "cancelled"; a timeout counts as a limit of length.
            self.finish_reason = "stop" if output.finish_reason == "stop" else "length"

    def pop_delta(self) -> dict[str, Any] | None:
        """Return the text and tokens since the last call, or None if there are none."""
        if not self._pending_text and self.finish_reason is None:
            return None
        text, self._pending_text = self._pending_text, ""
        return {
            "index": self.index,
            "text": text,
            "logprobs": None if self._logprobs is None else self._pop_logprobs(),
            "finish_reason": self.finish_reason,
        }

    def _add_token(self, token: TokenLogprobs) -> None:
        self._pending_tokens.append((token, self._decoded_length))
        token_bytes = self._tokenizer.token_bytes[token.token_id]
        self._decoded_length += len(self._decoder.decode(token_bytes))

    def _pop_logprobs(self) -> dict[str, Any]:
        """Return the tokens whose text has been returned; a stop string has none."""
        stop = sum(offset < self._text_length for _, offset in self._pending_tokens)
        tokens, self._pending_tokens = self._pending_tokens[:stop], self._pending_tokens[stop:]
        top_logprobs = [self._top_logprobs(token) for token, _ in tokens]
        return {
            "tokens": [self._token_name(token.token_id) for token, _ in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": top_logprobs if self._logprobs else None,
            "text_offset": [offset for _, offset in tokens],
        }

    def _top_logprobs(self, token: TokenLogprobs) -> dict[str, float] | None:
        """Map names to log-probabilities; of tokens with one name, the most probable counts."""
        if token.logprob is None:
            return None
        by_name: dict[str, float] = {}
        for token_id, logprob in token.top_logprobs:
            by_name.setdefault(self._token_name(token_id), logprob)
        return by_name

    def _token_name(self, token_id: int) -> str:
        """Return a token's text, or its bytes if they are part of a character."""
        token_bytes = self._tokenizer.token_bytes[token_id]
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


class Completion:
    """The response to one request: `n` choices for each prompt.

    Args:
        request: The request.
        prompts: Its prompts.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, request: CompletionRequest, prompts: Sequence[Prompt], tokenizer: Tokenizer):
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        repeated = [prompt for prompt in prompts for _ in range(request.n)]
        self.choices = [Choice(i, prompt, tokenizer, request) for i, prompt in enumerate(repeated)]
        self._include_usage = request.stream_options.include_usage
        self._metadata = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }

    def to_response(self, outputs: IndexedOutputs) -> dict[str, Any]:
        """Return the response for all outputs of all sequences."""
        self._add(outputs)
        choices = [choice.pop_delta() for choice in self.choices]
        return self._metadata | {"choices": choices, "usage": self._usage()}

    async def to_sse(self, job: GenerationJob, first: IndexedOutputs) -> AsyncIterator[bytes]:
        """Yield server-sent events, ending with [DONE]; each item holds those of one delivery.

        Args:
            job: The job.
            first: Outputs that were already received from the job.
        """
        try:
            yield self._deltas(first)
            async for outputs in job.stream():
                yield self._deltas(outputs)
        except Exception as error:  # The status was already sent.
            yield _event(internal_error(error).content())
            return
        if self._include_usage:
            yield _event(self._metadata | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _add(self, outputs: IndexedOutputs) -> list[Choice]:
        """Append outputs to their choices, and return these choices."""
        for index, output in outputs:
            self.choices[index].add(output)
        return [self.choices[index] for index in dict.fromkeys(index for index, _ in outputs)]

    def _deltas(self, outputs: IndexedOutputs) -> bytes:
        """Return one event for each choice with new text."""
        usage = {"usage": None} if self._include_usage else {}
        deltas = [choice.pop_delta() for choice in self._add(outputs)]
        return b"".join(_event(self._metadata | {"choices": [d]} | usage) for d in deltas if d)

    def _usage(self) -> dict[str, int]:
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }


def prompt_logprobs(model: "Model", ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Return the log-probabilities of a prompt's tokens, in nats.

    Tokens that never occurred in training have probability 0, as in `StepOutput`.

    Args:
        model: The model.
        ids: Token ids, at most the context length.
        num_top: Number of most probable alternatives per token.
    """
    logits = model.logits([ids])[0, :-1].astype(np.float64)  # (T - 1, V)
    for start, stop in model.summary["unseen_token_ranges"]:
        logits[:, start:stop] = -np.inf
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    tokens = [TokenLogprobs(ids[0], None, ())]
    for token_id, row in zip(ids[1:], logprobs, strict=True):
        top_ids = np.argsort(-row, kind="stable")[:num_top]
        top_logprobs = [(int(i), float(row[i])) for i in top_ids if row[i] > -np.inf]
        logprob = float(max(row[token_id], MIN_LOGPROB))
        tokens.append(TokenLogprobs(token_id, logprob, top_logprobs))
    return tokens


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {to_json(content)}\n\n".encode()
