"""lm-eval's model ``"hf-fastpath"``: every request goes through the quantized KV cache, as in decoding.

lm-eval's own ``HFLM`` scores a request in one forward pass, in which keys and values are attended to before they are
rounded: a quantized cache changes nothing there. Here a request is fed in chunks, so that every token attends to what
the cache holds at that moment of decoding. Several processes (``accelerate launch``) share the requests.

In Python::

    lm = FastpathLM(pretrained=model, tokenizer=tokenizer)  # a patched model, or any other
    lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])

With lm-eval's command line, which knows no plugins, so that this module starts it::

    python -m hf_fastpath.eval.lm run --model hf-fastpath \\
        --model_args pretrained=PATH,weights=w4a16,kv_cache=int4,kv_chunk=64 --tasks hellaswag
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from hf_fastpath import FastpathConfig, patch_model
from hf_fastpath.eval.chunks import KV_CHUNK
from hf_fastpath.eval.compare import empty_cache
from hf_fastpath.eval.continuations import Answer, Question, Tokens, answer, in_batches
from hf_fastpath.eval.loading import load
from hf_fastpath.eval.processes import Processes
from hf_fastpath.steps import STATE

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ValueError(f"benchmarks need lm-eval ({error}): pip install 'hf-fastpath[eval]'") from error

PLAIN = 0  # a kv_chunk: one forward pass a request, as HFLM does
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16"}  # lm-eval's names
Encoded = dict[tuple[str, str], tuple[list[int], list[int]]]
_FIELDS = {field.name for field in dataclasses.fields(FastpathConfig)}

_PAIRS = 2048  # encoded at once: some hundred MB with long prompts
_AUTO_BATCH = 64  # sequences at once where lm-eval is asked for "auto"

Request = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation) and the token ids of both


@register_model("hf-fastpath")
class FastpathLM(HFLM):
    """A causal model whose KV cache is in the loop of every log-likelihood.

    Args:
        pretrained: a model (patched or not; with options of :class:`FastpathConfig` it is patched here), or a path or
            hub id, which is loaded and patched by the options (none: :class:`FastpathConfig`'s defaults).
        tokenizer: the model's; needed beside a model that was not loaded from a folder or the hub.
        kv_chunk: tokens fed at once; 1 is token by token. It changes the speed, not what is measured. 0 is HFLM's own
            single pass, where the cache is written but a quantized one is not read: for comparison.
        device: of a path or hub id: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        dtype: likewise: ``"bf16"``, ``"fp16"``, ``"fp32"``, ``"auto"``, or torch's names.
        batch_size: sequences at once; a context is read once for all its continuations.
        on_progress: called with (contexts done, contexts in all) of this process.
        encoded: token ids by (context, continuation), filled here: for several models of one tokenizer, which takes
            longer than a small model on a GPU.
        options: fields of :class:`FastpathConfig` (``weights``, ``kv_cache``, ...; the string ``"none"`` is None), or
            arguments of HFLM.

    Raises:
        ValueError: a bad option, or a patched model beside options. Unsupported: the model cannot be loaded or patched.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        kv_chunk: int = KV_CHUNK,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = 1,
        on_progress: Callable[[int, int], None] | None = None,
        encoded: Encoded | None = None,
        **options: Any,
    ) -> None:
        kv_chunk = _chunk(kv_chunk)
        ours = {name: _none(options.pop(name)) for name in [*options] if name in _FIELDS}
        processes = Processes()
        if isinstance(pretrained, str):
            name = str(dtype).removeprefix("torch.") if dtype else "auto"
            where, _, number = (device or "auto").partition(":")
            if number:
                torch.cuda.set_device(int(number))
            loaded = load(pretrained, where, _DTYPES.get(name, name))
            model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
            if not hasattr(model, STATE):
                patch_model(model, {"progress": False} | ours)
        else:
            model = pretrained
            if ours and hasattr(model, STATE):
                raise ValueError(f"the model is patched already: leave out {', '.join(map(repr, sorted(ours)))}")
            if ours:
                patch_model(model, {"progress": False} | ours)
        options.setdefault("softmax_dtype", "float32")  # HFLM's is the model's: 8 bits are few for a log-likelihood
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options)
        self.kv_chunk = kv_chunk
        self.processes = processes
        self.on_progress = on_progress
        self.encoded = encoded
        self._ids: dict[str, list[int]] = {}  # of texts that are just being encoded together
        state = getattr(model, STATE, None)
        self.fastpath: FastpathConfig | None = state.config if state else None
        self._done = self._total = 0
        self.requests_seen = self.tokens_seen = 0  # what all processes were asked, one token continuations together

    @property
    def mode(self) -> str:
        """What was measured, in words for a report."""
        if self.kv_chunk == PLAIN:
            return "one forward pass a request; a quantized KV cache is not read"
        cache = self.fastpath.kv_cache.value if self.fastpath and self.fastpath.kv_cache else "full-precision"
        return f"decoding through the {cache} KV cache, fed {self.kv_chunk} tokens at a time"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """HFLM's, or what :meth:`_encode_pairs` has encoded already."""
        if add_special_tokens is None and not kwargs and string in self._ids:
            return self._ids[string]
        return super().tok_encode(string, add_special_tokens, **kwargs)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """HFLM's, remembered."""
        if self.encoded is None:
            return super()._encode_pair(context, continuation)
        pair = context, continuation
        if pair not in self.encoded:
            self.encoded[pair] = super()._encode_pair(context, continuation)
        return self.encoded[pair]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Encodes new pairs many at once, which tokenizers do on all cores."""
        assert self.encoded is not None
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        bos = self.tokenizer.decode(self.prefix_token_id)
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.encoded and pair[0]]
        for part in (new[start : start + _PAIRS] for start in range(0, len(new), _PAIRS)):
            texts = {text for context, continuation in part for text in (context + continuation, context.rstrip())}
            plain = [text for text in texts if text and not text.startswith(bos)]  # of the others HFLM sees to a second
            self._ids = dict(zip(plain, self.tokenizer(plain, verbose=False, **special).input_ids, strict=True))
            for pair in part:
                self._encode_pair(*pair)
        self._ids = {}

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """HFLM's single pass, counted."""
        logits = super()._model_call(inps, attn_mask, labels)
        self._count(len(inps))
        return logits

    def _count(self, done: int) -> None:
        self._done += done
        if self.on_progress is not None:
            self.on_progress(self._done, self._total)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """HFLM's, without its bar where there is another."""
        if self.encoded is not None:
            self._encode_pairs([request.args for request in requests])
        return super().loglikelihood(requests, disable_tqdm or self.on_progress is not None)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """HFLM's, of this process's share of the requests; every process returns the answers to all."""
        passes = {tuple(context + continuation[:-1]) for _, context, continuation in requests}
        self.requests_seen += len(passes)
        self.tokens_seen += sum(map(len, passes))
        quiet = disable_tqdm or self.on_progress is not None or self.processes.rank > 0
        share = self._single_passes if self.kv_chunk == PLAIN else self._through_cache
        mine = share(requests, quiet, override_bs)
        found = {index: answer for part in self.processes.gather(mine) for index, answer in part.items()}
        return [found[index] for index in range(len(requests))]

    def _single_passes(self, requests: Sequence[Request], quiet: bool, override_bs: int | None) -> dict[int, Answer]:
        """Answers to this process's share of the requests, by their numbers."""
        groups: dict[Tokens, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):  # one forward pass serves what HFLM groups
            groups.setdefault(tuple(context + continuation[:-1]), []).append(index)
        order = sorted(groups, key=lambda tokens: (-len(tokens), tokens))[self.processes.rank :: self.processes.count]
        self._done, self._total = 0, len(order)
        mine = [index for tokens in order for index in groups[tokens]]
        answers = super()._loglikelihood_tokens([requests[i] for i in mine], quiet, override_bs) if mine else []
        return dict(zip(mine, answers, strict=True))

    def _through_cache(self, requests: Sequence[Request], quiet: bool, override_bs: int | None) -> dict[int, Answer]:
        """The same, contexts being read once. Processes share batches, so that their number does not change one."""
        groups: dict[Tokens, dict[Tokens, list[int]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            tokens = tuple((context + continuation)[-(self.max_length + 1) :])  # as HFLM truncates it
            tail = tuple(continuation)
            groups.setdefault(tokens[: -len(tail)], {}).setdefault(tail, []).append(index)
        questions = [Question(context, tuple(tails)) for context, tails in groups.items()]
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else _AUTO_BATCH)
        batches = in_batches(questions, size)
        mine = batches[self.processes.rank :: self.processes.count]
        self._done, self._total = 0, sum(map(len, mine))
        found: dict[int, Answer] = {}
        for batch in tqdm(mine, disable=quiet, desc="Batches of questions"):
            asked = [questions[number] for number in batch]
            for question, answers in zip(asked, self._answer(asked), strict=True):
                for tail, one in zip(question.continuations, answers, strict=True):
                    found |= dict.fromkeys(groups[question.context][tail], one)
            self._count(len(batch))
        for index, one in found.items():
            if requests[index][0] is not None:  # a part of a longer text is not lm-eval's to remember
                self.cache_hook.add_partial("loglikelihood", requests[index][0], one)
        return found

    def _answer(self, questions: list[Question]) -> list[list[Answer]]:
        return answer(self.model, questions, lambda: empty_cache(self.model, self.fastpath), self.kv_chunk)


def _chunk(kv_chunk: Any) -> int:
    if type(kv_chunk) is not int or kv_chunk < 0:
        raise ValueError(f"kv_chunk={kv_chunk!r}: allowed are 1 (token by token) or more, and 0 for a single pass")
    return kv_chunk


def _none(value: Any) -> Any:
    """lm-eval's command line has no None."""
    return None if isinstance(value, str) and value.lower() == "none" else value


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
