"""Token sampling for batches in which every row has its own parameters, seed and grammar.

A row's tokens depend on its seed and its own logits only, never on the rest of the batch. It knows nothing of prompts,
images or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.engines import Sampling
from pipeline.errors import BadRequestError, EngineDiedError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Row:
    """One answer while it is generated."""

    sampling: Sampling
    seed: int
    max_tokens: int  # the sampling's, or what the context leaves
    top_tokens: int = 0
    matcher: Any = None  # xgrammar's, of the schema
    tokens: list[int] = field(default_factory=list)
    choices: list[dict[int, float]] = field(default_factory=list)  # by token: log-probabilities of the likeliest
    stopped: bool = False  # by an end-of-text token

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.tokens) >= self.max_tokens


class TokenSampler:
    """A logits processor for `generate(do_sample=False)` that masks every token except the chosen one."""

    def __init__(self, rows: Sequence[Row], *, prompt: Tensor, mask: Tensor, ends: Tensor, suppressed: Tensor) -> None:
        import torch

        self._rows = rows
        self._prompt, self._mask = prompt, mask  # [rows, tokens]
        self._ends = set(ends.tolist())
        self._suppressed = suppressed
        self._draws = [_draw_uniform(row) for row in rows]
        self._seen: Tensor | None = None  # [rows, vocabulary]: for the repetition penalty
        self._torch = torch

    def __call__(self, _: Tensor, logits: Tensor) -> Tensor:
        torch = self._torch
        scores = logits.float()
        raw = scores.log_softmax(-1) if any(row.top_tokens for row in self._rows) else None
        scores = scores.clone()
        scores[:, self._suppressed] = -torch.inf
        self._apply_penalties(scores)
        self._mask_by_grammar(scores)
        chosen = self._choose_tokens(scores)
        self._append_tokens(chosen, raw)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, chosen[:, None], 0.0)

    def finished(self, ids: Tensor, _: Any, **__: Any) -> Tensor:
        """The stopping criterion."""
        return self._torch.tensor([row.finished for row in self._rows], device=ids.device)

    def _apply_penalties(self, scores: Tensor) -> None:
        penalties = [row.sampling.repetition_penalty for row in self._rows]
        if all(penalty == 1 for penalty in penalties):
            return
        if self._seen is None:
            self._seen = self._torch.zeros_like(scores, dtype=self._torch.bool)
            for n in range(len(self._rows)):
                self._seen[n, self._prompt[n][self._mask[n].bool()]] = True
        by = self._torch.tensor(penalties, device=scores.device)[:, None]
        scores.copy_(self._torch.where(self._seen, self._torch.where(scores > 0, scores / by, scores * by), scores))

    def _mask_by_grammar(self, scores: Tensor) -> None:
        for n, row in enumerate(self._rows):
            if row.matcher is None or row.finished:
                continue
            import xgrammar

            mask = xgrammar.allocate_token_bitmask(1, scores.shape[1])
            row.matcher.fill_next_token_bitmask(mask)
            xgrammar.apply_token_bitmask_inplace(scores[n : n + 1], mask.to(scores.device))

    def _choose_tokens(self, scores: Tensor) -> Tensor:
        chosen = scores.argmax(-1)
        hot = [n for n, row in enumerate(self._rows) if row.sampling.temperature > 0 and not row.finished]
        if hot:
            samplings = [self._rows[n].sampling for n in hot]
            points = self._torch.stack([self._draws[n][len(self._rows[n].tokens)] for n in hot])
            chosen[hot] = _sample_tokens(scores[hot], samplings, points.to(scores.device))
        return chosen

    def _append_tokens(self, chosen: Tensor, raw: Tensor | None) -> None:
        for n, (row, token) in enumerate(zip(self._rows, chosen.tolist(), strict=True)):
            if row.finished:
                continue
            row.tokens.append(token)
            row.stopped = token in self._ends
            if row.top_tokens and raw is not None:
                row.choices.append(_rank_tokens(raw[n], token, row.top_tokens))
            if row.matcher is not None and not row.stopped:
                row.matcher.accept_token(token)
            if self._seen is not None:
                self._seen[n, token] = True


def _rank_tokens(logprobs: Tensor, chosen: int, num: int) -> dict[int, float]:
    values, tokens = logprobs.topk(min(num, len(logprobs)))
    return dict(zip(tokens.tolist(), values.tolist(), strict=True)) | {chosen: float(logprobs[chosen])}


def _draw_uniform(row: Row) -> Tensor:
    """Draws one number in [0, 1) per token, on the CPU, so that every device gets the same ones."""
    import torch

    generator = torch.Generator().manual_seed(row.seed % 2**63)
    return torch.rand(row.max_tokens if row.sampling.temperature > 0 else 0, generator=generator, dtype=torch.float64)


def _sample_tokens(scores: Tensor, samplings: Sequence[Sampling], points: Tensor) -> Tensor:
    """Picks for each row the token whose interval of the sorted, filtered distribution holds the row's point."""
    import torch

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=scores.device, dtype=scores.dtype)[:, None]

    vocabulary = scores.shape[1]
    scores = scores / column([sampling.temperature for sampling in samplings])
    ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(vocabulary, device=scores.device)[None, :]
    ordered = ordered.masked_fill(ranks >= column([sampling.top_k or vocabulary for sampling in samplings]), -torch.inf)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(
        (before >= column([sampling.top_p for sampling in samplings])) & (ranks > 0), 0.0
    )
    cumulative = probabilities.double().cumsum(-1)
    targets = points.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    positions = torch.searchsorted(cumulative, targets, right=True)
    return tokens.gather(1, positions.clamp(max=vocabulary - 1)).squeeze(1)


class Grammars:
    """Compiles JSON schemas to matchers, each schema once."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self._compiler: Any = None

    def compile_matcher(self, schema: str) -> Any:
        """Raises:
        BadRequestError: the schema is not supported.
        EngineDiedError: xgrammar is not installed.
        """
        try:
            import xgrammar
        except ImportError as error:
            raise EngineDiedError(
                "a schema needs xgrammar: pip install '.[transformers]' in a clone of recap"
            ) from error
        if self._compiler is None:
            info = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=self._vocabulary, stop_token_ids=self._ends
            )
            self._compiler = xgrammar.GrammarCompiler(info)
        try:
            # With free whitespace a weak model may write blanks until its tokens run out.
            return xgrammar.GrammarMatcher(self._compiler.compile_json_schema(schema, any_whitespace=False))
        except (RuntimeError, ValueError) as error:
            raise BadRequestError(f"the schema is not supported: {' '.join(str(error).split())}") from error
