"""Which objective to train with: from what one has to what to run. A pure function of a few answers."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from jaxpo.recipes import (
    APO_DOWN,
    APO_ZERO_UNPAIRED,
    BCO,
    CDPO,
    CPO,
    DPO,
    DPO_NORM,
    IPO,
    KTO,
    LD,
    LIST_COLUMNS,
    NLL,
    ORPO,
    PAIR_COLUMNS,
    PLACKETT_LUCE,
    RATED_LIST_COLUMNS,
    RATED_PAIR_COLUMNS,
    REWARD,
    ROBUST,
    RPO,
    SCORE_LABELS,
    SFT,
    SIMPO,
    SOFT,
    TR_DPO,
    Pick,
    all_pairs,
)

Data = Literal["pairs", "labels", "rankings", "demonstrations", "prompts"]
Goal = Literal["policy", "scorer"]


@dataclass(frozen=True)
class Answers:
    """What someone has and wants.

    data: what a row of the data holds: two answers, the better one first; an answer and whether it is desirable;
    answers in order; an answer to imitate; a prompt alone. goal: a better model, or a reward model.
    noisy: many judgements are wrong. probabilities: rows say how sure the judgement is; scores: they rate the answers.
    wordy: the better answers are mostly the longer ones. exact: answers are right or wrong, not nicer or less nice.
    weak_chosen: the model writes better answers than the good ones. tight: too little memory or time for a reference.
    base_model: the model was never tuned to answer. reward: a reward model, or a program that judges, is at hand.
    """

    data: Data
    goal: Goal = "policy"
    noisy: bool = False
    probabilities: bool = False
    scores: bool = False
    wordy: bool = False
    exact: bool = False
    weak_chosen: bool = False
    tight: bool = False
    base_model: bool = False
    reward: bool = False


@dataclass(frozen=True)
class Step:
    """Something to do: in words, with a command, or a training run."""

    text: str
    pick: Pick | None = None
    command: str | None = None


@dataclass(frozen=True)
class Advice:
    """What to do, in order; what else to try; and what to know."""

    steps: tuple[Step, ...]
    others: tuple[Pick, ...]
    notes: tuple[str, ...]

    @property
    def picks(self) -> tuple[Pick, ...]:
        return tuple(step.pick for step in self.steps if step.pick is not None)

    @property
    def main(self) -> Pick:
        """The run that it all comes to."""
        return self.picks[-1]


def advise(answers: Answers) -> Advice:
    """What to do for every set of answers: there is always something."""
    advice = _for_scorer(answers) if answers.goal == "scorer" else _FOR[answers.data](answers)
    return replace(advice, notes=tuple(dict.fromkeys((*advice.notes, *_always(answers, advice)))))


def without_effect(answers: Answers) -> tuple[str, ...]:
    """The fields that are said to be so and change nothing: without them all the advice is the same."""
    idle: list[str] = []
    for name in (name for name, value in asdict(answers).items() if value is True):
        less = replace(answers, **{name: False})
        if advise(less) == advise(answers):
            idle.append(name)
            answers = less
    return tuple(idle)


def _for_pairs(a: Answers) -> Advice:
    pick, notes = _pair_pick(a)
    others = [ROBUST, IPO] if a.noisy else [TR_DPO, IPO]
    if a.tight:
        others = [CPO, SIMPO]
    elif a.exact:
        others = [replace(RPO, objective="dpop", why=_DPOP, overrides=("objective='{name: dpop, penalty: 50}'",))]
    elif a.wordy:
        others = [replace(DPO_NORM, objective="rdpo", why=_RDPO, config="rdpo-qwen2.5-ultrafeedback")]
    steps = [Step("Train on the pairs.", pick)]
    if a.base_model and pick.objective not in ("orpo", "cpo"):
        before = "Fine-tune the base model on the chosen answers first: the same file serves."
        tune = replace(SFT, rows="pairs", columns=PAIR_COLUMNS, output="runs/sft")
        steps = [Step(before, tune), Step("Then train on the pairs.", replace(pick, model="runs/sft/export"))]
    return Advice(tuple(steps), _besides(others, pick), tuple(notes))


_DPOP = "Punishes only what makes the right answer less likely than it was."
_RDPO = "DPO with a price on length, alpha, as a dial."


def _pair_pick(a: Answers) -> tuple[Pick, list[str]]:
    """The objective for pairs, put together from the answers, and what to know of it."""
    notes: list[str] = []
    if a.weak_chosen:
        if a.tight:
            notes.append("apo_down measures answers against the reference and cannot do without it.")
        if a.probabilities or a.scores:
            notes.append(
                "apo_down has no use for soft labels: leave out chosen_probability; ratings are not looked at."
            )
        if a.noisy:
            notes.append("apo_down has no label smoothing, but a bounded loss: a wrong label pulls only so hard.")
        if a.exact:
            notes.append(
                "Where the chosen answers are right at least, prefer rpo-qwen2.5-ultrafeedback.yaml: apo_down makes "
                "them less likely."
            )
        modifiers = [LD] if a.wordy else []
        return replace(APO_DOWN, overrides=(*APO_DOWN.overrides, *_modified(modifiers, []))), notes
    soft = a.probabilities or a.scores
    if a.tight:
        base = SIMPO
        if (a.exact or a.base_model) and not a.wordy:
            base = ORPO if a.base_model and not (a.exact or a.noisy or soft) else CPO
        own = ["objective.nll_coefficient=1.0"] if base is SIMPO and a.exact else []
        had = wanted = []
    elif a.wordy:
        base, own, had, wanted = DPO_NORM, [], [], [NLL] if a.exact else []
    elif a.exact:
        base, own, had, wanted = RPO, [], [NLL], [NLL]
    elif soft:
        base, own, had, wanted = SOFT, [], [SCORE_LABELS], []
    else:
        base, own, had, wanted = CDPO if a.noisy else DPO, [], [], []
    if a.scores and not a.probabilities:
        wanted = [*wanted, SCORE_LABELS]
    if a.noisy and not a.probabilities and base is not CDPO:
        own = [*own, "objective.label_smoothing=0.1"]
    columns = base.columns
    if a.probabilities:
        columns += ", chosen_probability"
        notes.append("chosen_probability is the share of judges who prefer the chosen answer, from 0.5 to 1.")
    elif a.scores:
        columns = RATED_PAIR_COLUMNS
        notes.append("Set the scale of score_labels so that sigmoid(scale * gap) is how sure a typical gap makes you.")
    return replace(base, columns=columns, overrides=(*own, *_modified(wanted, had))), notes


def _modified(wanted: Sequence[str], had: Sequence[str]) -> tuple[str, ...]:
    """The override that makes a config's modifiers the ones that are wanted."""
    return () if list(wanted) == list(had) else (f"objective.modifiers='[{', '.join(wanted)}]'",)


def _for_labels(a: Answers) -> Advice:
    notes: list[str] = []
    pick = KTO
    if a.tight:
        pick = BCO if not a.noisy else KTO if a.weak_chosen else APO_ZERO_UNPAIRED
        notes.append("No objective for labels does without the reference: one forward pass makes its table.")
    elif a.weak_chosen:
        notes.append("KTO's reference point moves with the model, so that weak desirable answers do not hold it back.")
    others = [BCO, *([] if a.weak_chosen else [APO_ZERO_UNPAIRED])]
    columns = pick.columns
    if a.probabilities:
        columns = "prompt, completion, label (a probability from 0 to 1)"
    elif a.scores:
        notes.append("Make labels of the ratings: true from a threshold on, or a probability from 0 to 1.")
    if a.wordy:
        notes.append(
            "No objective for labels has rewards per token: give both kinds of answers the same lengths (`data` shows "
            "them), or make pairs of answers to one prompt and train with dpo_norm."
        )
        others.append(DPO_NORM)
    if a.exact:
        notes.append("Of prompts with a right and a wrong answer make pairs: they teach more than labels do.")
        others.append(RPO)
    steps = [Step("Train on the labelled answers.", replace(pick, columns=columns))]
    if a.base_model:
        tune = replace(SFT, rows="desirable", columns="prompt, completion", output="runs/sft")
        steps = [
            Step("Put the rows with desirable answers into a file of their own, without the label."),
            Step("Fine-tune the base model on them.", tune),
            Step("Then train on all labelled answers.", replace(pick, columns=columns, model="runs/sft/export")),
        ]
    return Advice(tuple(steps), _besides(others, pick), tuple(notes))


def _for_rankings(a: Answers) -> Advice:
    pick, notes = _list_pick(a)
    if a.probabilities:
        notes.append("Lists have no soft labels; rate the answers (scores) to say how far apart they are.")
    if a.exact:
        notes.append(
            "To keep the right answers likely, make pairs of the best and the worst of a list and train with "
            "rpo-qwen2.5-ultrafeedback.yaml: the likelihood term does not apply to every pair of a list."
        )
    steps = [Step("Train on the lists.", pick)]
    if a.base_model:
        before = "Fine-tune the base model on the best answers first: the same file serves."
        tune = replace(SFT, rows="lists", columns=LIST_COLUMNS, output="runs/sft")
        steps = [Step(before, tune), Step("Then train on the lists.", replace(pick, model="runs/sft/export"))]
    others = [PLACKETT_LUCE, *([RPO] if a.exact else [])]
    return Advice(tuple(steps), _besides(others, pick), tuple(notes))


def _list_pick(a: Answers) -> tuple[Pick, list[str]]:
    """The objective for lists of answers."""
    pick, notes = _list_objective(a)
    return (replace(pick, columns=RATED_LIST_COLUMNS) if a.scores else pick), notes


def _list_objective(a: Answers) -> tuple[Pick, list[str]]:
    smoothing = ", label_smoothing: 0.1" if a.noisy else ""
    modifiers = f", modifiers: [{SCORE_LABELS}]" if a.scores else ""
    if a.weak_chosen:
        notes = ["apo_down measures answers against the reference and cannot do without it."] if a.tight else []
        why = "Every pair of a list under apo_down: the best answers are no example to a better model."
        return all_pairs("{name: apo_down, beta: 0.05}", why, True), notes
    if a.tight:
        return all_pairs(f"{{name: simpo{smoothing}{modifiers}}}", f"Every pair of a list. {SIMPO.why}", False), []
    if a.wordy:
        pair = f"{{name: dpo_norm, beta: 5.0{smoothing}{modifiers}}}"
        return all_pairs(pair, "Every pair of a list, with rewards per token: length earns nothing.", True), []
    if a.noisy or a.scores:
        why = "Every pair of a list under DPO, with " + ("soft labels." if a.scores else "smoothed labels.")
        return all_pairs(f"{{name: dpo, beta: 0.1{smoothing}{modifiers}}}", why, True), []
    return PLACKETT_LUCE, []


def _for_demonstrations(a: Answers) -> Advice:
    notes = ["To go further one needs worse answers too: let the model answer the same prompts, and have them judged."]
    pick = SFT
    if a.base_model:
        notes.append("The config names a chat template, for a base model's tokenizer has none (data.chat_template).")
    else:
        # The config is for a small base model.
        pick = replace(SFT, overrides=("data.chat_template=null", "optimizer.learning_rate=2.0e-5"))
    if a.weak_chosen:
        notes.append("Answers that are worse than the model's own only pull it down: leave them out.")
    return Advice((Step("Train on the answers.", pick),), (), tuple(notes))


def _for_prompts(a: Answers) -> Advice:
    notes = ["Methods that let the model answer while it trains (online) are not here yet; this is one round of them."]
    model = "MODEL"
    steps: list[Step] = []
    if a.base_model:
        notes.append(
            "A base model does not answer yet: fine-tune one on public conversations first, or take a chat model."
        )
        steps.append(Step("Fine-tune the base model.", replace(SFT, rows=None, output="runs/sft")))
        model = "runs/sft/export"
    judge = "JUDGE"
    if not a.reward:
        judge = "runs/reward/export"
        text = (
            "Train a reward model on public pairs. Better: have people compare answers to your prompts, and add those."
        )
        steps.append(Step(text, replace(REWARD, rows=None, columns="the config's own data")))
    sample = (
        f"Let {'your model' if model == 'MODEL' else model} answer each prompt four times, with a temperature of about "
        "1 (vLLM or transformers), and write rows of prompt and completions to candidates.jsonl."
    )
    rate = "Rate the answers."
    if a.reward:
        rate += " If a program judges, let it write a list of numbers, scores, into each row instead."
    command = f"python -m jaxpo.launch score {judge} candidates.jsonl --output lists.jsonl"
    steps += [Step(sample), Step(rate, command=command)]
    pick, more = _list_pick(replace(a, scores=True))
    steps.append(Step("Train on the rated lists; keep some of them for lists-test.jsonl.", replace(pick, model=model)))
    notes += more
    if a.exact:
        notes.append("Verdicts of right and wrong alone make ties: write labels instead, and train with kto.")
    if a.probabilities:
        notes.append("Judgements by people are worth more than a model's: have some of the candidates compared.")
    others = [KTO] if a.exact else []
    return Advice(tuple(steps), _besides(others, pick), tuple(notes))


def _for_scorer(a: Answers) -> Advice:
    pick, notes = REWARD, []
    if a.data == "pairs":
        pick = replace(pick, columns=PAIR_COLUMNS)
    elif a.data == "rankings":
        pick = replace(pick, columns=LIST_COLUMNS, rows="lists", overrides=("objective.max_completions=4",))
    if a.data in ("pairs", "rankings"):
        if a.scores:
            rated = RATED_PAIR_COLUMNS if a.data == "pairs" else RATED_LIST_COLUMNS
            pick = replace(pick, columns=rated, overrides=(*pick.overrides, "objective.margin=1.0"))
            notes.append("margin asks for rewards as far apart as the ratings; scale it to a few units of reward.")
        if a.probabilities and a.data == "pairs":
            pick = replace(pick, columns=f"{pick.columns}, chosen_probability")
        elif a.noisy:
            notes.append("Write how sure the judges are into a column chosen_probability: it softens the labels.")
        return Advice((Step("Train the reward model.", pick),), (), tuple(notes))
    make = {
        "labels": "Make pairs: of each prompt with a desirable and an undesirable answer, these two.",
        "demonstrations": "Make pairs: let a weaker model answer the same prompts; its answers are the rejected ones.",
        "prompts": "Make pairs: let a model answer each prompt twice, and have people say which answer is better.",
    }[a.data]
    notes.append("Until you have pairs, the config's own data make a general reward model: leave out data.*.")
    return Advice((Step(make), Step("Train the reward model.", replace(pick, columns=PAIR_COLUMNS))), (), tuple(notes))


def _always(a: Answers, advice: Advice) -> Iterator[str]:
    """What goes for every recommendation."""
    if a.tight:
        yield (
            "Training holds one model, whatever the objective. Less memory: a smaller data.max_length and "
            "training.row_length, model.remat=full (the default), training.rows_per_device=1 (the default), "
            "optimizer.offload=true."
        )
    if a.reward and a.data != "prompts" and a.goal == "policy":
        yield (
            "Your reward model can rate these rows, too (`score JUDGE FILE --output rated.jsonl`): scores soften "
            "labels and order lists."
        )
    if advice.main.reference:
        yield "The reference is a table: one forward pass over the data, kept on disk for the next runs."
    yield "Rows of messages get the model's chat template, rows of plain strings are taken as they are."


def _besides(others: Sequence[Pick], pick: Pick) -> tuple[Pick, ...]:
    """What else to try, without what is recommended anyway."""
    return tuple(other for other in others if (other.objective, other.config) != (pick.objective, pick.config))


_FOR = {
    "pairs": _for_pairs,
    "labels": _for_labels,
    "rankings": _for_rankings,
    "demonstrations": _for_demonstrations,
    "prompts": _for_prompts,
}
