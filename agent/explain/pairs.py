"""One question about workloads: each pair of their Pods is asked, and one answer is told for all. Pure.

deploy/web: web-1, web-2 --+--> web-1 to api-1, web-1 to api-2, ...  --why--> the first that is denied,
deploy/api: api-1, api-2 --+    (MOST_PAIRS of them)                          else the first
                                                                   and how the others are beside it
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import NamedTuple

from agent.cluster.model import Pod
from agent.explain.answer import Answer
from agent.explain.ends import Meant
from agent.explain.question import CannotAnswerError, Question
from agent.explain.way import why
from agent.explain.world import End, World, node_of, title

MOST_PAIRS = 64
MOST_NAMES = 3  # pairs that are named; of more only the number


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked about each pair of two ends; `first` is the question about the first of each."""

    source: Meant
    target: Meant
    first: Question

    def between(self, source: End, target: End) -> Question:
        """The question about one pair."""
        return replace(self.first, source=source, target=target)

    def each(self) -> Iterator[Question]:
        """Those about as many Pods of either end as there can be; none from a Pod of several to itself."""
        pairs = list(islice(self._pairs(), MOST_PAIRS))
        return (self.between(*pair) for pair in pairs or [(self.first.source, self.first.target)])

    @property
    def total(self) -> int:
        """How many pairs there are."""
        sources, targets = self.source.ends, self.target.ends
        return (len(sources) * len(targets) - len(_keys(sources) & _keys(targets))) or 1

    def _pairs(self) -> Iterator[tuple[End, End]]:
        sources, targets = self.source.ends[: MOST_PAIRS + 1], self.target.ends[: MOST_PAIRS + 1]
        places = sorted(product(range(len(sources)), range(len(targets))), key=max)
        pairs = ((sources[row], targets[column]) for row, column in places)
        return (pair for pair in pairs if not _keys(pair[:1]) & _keys(pair[1:]))


class Pair(NamedTuple):
    """A question about two Pods, and its answer."""

    question: Question
    answer: Answer

    @property
    def kind(self) -> tuple[object, ...]:
        """What is the same of pairs that are alike."""
        answer = self.answer
        return answer.allowed, answer.cause, tuple((step.stage, step.ok) for step in answer.steps)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs that were asked, and what they were asked of."""

    questions: Questions
    asked: tuple[Pair, ...]

    @property
    def told(self) -> Pair:
        """The one whose answer is told."""
        return next((pair for pair in self.asked if not pair.answer.allowed), self.asked[0])

    @property
    def allowed(self) -> int:
        """How many are allowed."""
        return sum(pair.answer.allowed for pair in self.asked)

    @property
    def alike(self) -> bool:
        """Whether all have the same answer, but for names and addresses."""
        return len({pair.kind for pair in self.asked}) == 1

    def in_words(self) -> str:
        """How the others are beside the one that is told; "" where no workload was asked about."""
        workloads = list(dict.fromkeys(str(of.workload) for of in self._ends if of.workload))
        if not workloads:
            return ""
        if self.questions.total == 1:
            return f"no other Pod of {' or '.join(workloads)} has an address"
        left_out = self.questions.total - len(self.asked)
        what = f"{'' if left_out else 'the '}{len(self.asked)} {self._many()}"
        said = f"the same for each of {what}" if self.alike else self._different(what)
        return f"{said}; {left_out} more were not asked" if left_out else said

    @property
    def _ends(self) -> tuple[Meant, Meant]:
        return self.questions.source, self.questions.target

    def _many(self) -> str:
        many = [str(of.workload) for of in self._ends if len(of.ends) > 1]
        what = "Pods" if len(many) == 1 else "pairs of Pods"
        return f"{what} of {' and '.join(dict.fromkeys(many))}"

    def _different(self, what: str) -> str:
        told, others = self.told, [pair for pair in self.asked if pair is not self.told]
        allowed = [pair for pair in others if pair.answer.allowed]
        denied = [pair for pair in others if not pair.answer.allowed]
        if told.answer.allowed:
            otherwise = [pair for pair in allowed if pair.kind != told.kind]
            return f"allowed for each of {what}; in another way: {self._named(otherwise)}"
        said = f"allowed for {len(allowed) or 'none'} of {what}"
        said += f": {self._named(allowed)}" if allowed else ""
        alike = [pair for pair in denied if pair.kind == told.kind]
        said += f"; denied as well: {self._named(alike)}" if alike else ""
        otherwise = [pair for pair in denied if pair.kind != told.kind]
        return said + (f"; denied in another way: {self._named(otherwise)}" if otherwise else "")

    def _named(self, pairs: list[Pair]) -> str:
        names = [self._name(pair.question) for pair in pairs[:MOST_NAMES]]
        more = f" and {len(pairs) - MOST_NAMES} more" if len(pairs) > MOST_NAMES else ""
        return ", ".join(names) + more

    def _name(self, of: Question) -> str:
        """By the ends that are several."""
        ends = ((self.questions.source, of.source), (self.questions.target, of.target))
        return " to ".join(_name(end) for meant, end in ends if len(meant.ends) > 1)


def each_asked(world: World, questions: Questions) -> Pairs:
    """Every pair's answer. Raises CannotAnswerError."""
    return Pairs(questions, tuple(Pair(each, why(world, each)) for each in questions.each()))


def one_of(questions: Questions, agents: Container[str]) -> Question:
    """The question about one pair that a packet can be sent for: between the first Pods that run.

    agents: the nodes that can make a Pod of a workload send. Raises CannotAnswerError.
    """
    senders = questions.source.ends
    if questions.source.workload:
        senders = tuple(end for end in senders if _runs(end) and node_of(end) in agents)
    if not senders:
        raise CannotAnswerError(f"no Pod of {questions.source.workload} runs on a node with an agent")
    source = senders[0]
    target = min(questions.target.ends, key=lambda end: (_keys((end,)) == _keys((source,)), not _runs(end)))
    return questions.between(source, target)


def taken_in_words(questions: Questions, question: Question) -> str:
    """Which Pods of workloads a question is about; "" where no workload was asked about."""
    ends = ((questions.source, question.source), (questions.target, question.target))
    said = [
        f"{_name(end)} of the {len(meant.ends)} Pods of {meant.workload}"
        if len(meant.ends) > 1
        else f"{_name(end)}, the only Pod of {meant.workload}"
        for meant, end in ends
        if meant.workload
    ]
    return f"taken: {'; '.join(said)}" if said else ""


def _runs(end: End) -> bool:
    return isinstance(end, Pod) and end.phase == "Running"


def _keys(ends: Iterable[End]) -> set[tuple[str, str]]:
    return {end.key for end in ends if isinstance(end, Pod)}


def _name(end: End) -> str:
    return end.name if isinstance(end, Pod) else title(end)
