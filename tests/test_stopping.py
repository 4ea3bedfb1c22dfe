"""The criteria: from scripted logs, then in real runs under every driver."""

import dataclasses
import math
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import tree

import tapekit as tk
from tapekit.stopping import (
    After,
    AllOf,
    AnyOf,
    Criterion,
    ForSteps,
    GradientNormBelow,
    LossBelow,
    LossChangeBelow,
    LossPlateau,
    MaxEvaluations,
    MaxIterations,
    NonFinite,
    VariablesChangeBelow,
    WallTime,
)

CONVERGED, LIMIT, NOT_FINITE = tk.StopReason.CONVERGED, tk.StopReason.LIMIT, tk.StopReason.NOT_FINITE
NAN, INF = math.nan, math.inf


def script(**columns):
    """Logs of consecutive steps, as Python numbers, from columns of equal length."""
    length = len(next(iter(columns.values())))
    columns = {"loss": [1.0] * length, "gradients_finite": [True] * length, **columns}
    steps = range(1, length + 1)
    return [
        {"step": step, "evaluations": step, **dict(zip(columns, values, strict=True))}
        for step, *values in zip(steps, *columns.values(), strict=True)
    ]


def losses(*values):
    return script(loss=values)


def tensors(logs):
    """The logs as a driver gives them: 64-bit integers and floats, and bools."""
    return {name: tf.constant(np.asarray(value)) for name, value in logs.items()}


def begin(criterion):
    return tree.map_structure(lambda leaf: tf.constant(np.asarray(leaf)), criterion.init())


def update(criterion, state, logs):
    new, stop = criterion.update(state, tensors(logs))
    return tree.map_structure(lambda old, value: tf.cast(value, old.dtype), state, new), bool(stop)


def play(criterion, scripted):
    """Feeds logs to a criterion; returns the step at which it stops, its reason and its sentence, or None."""
    state = begin(criterion)
    for logs in scripted:
        state, stop = update(criterion, state, logs)
        if stop:
            plain = tree.map_structure(lambda leaf: leaf.numpy().item(), state)
            return logs["step"], *criterion.explain(plain, logs)
    return None


def stops_at(criterion, scripted):
    outcome = play(criterion, scripted)
    return outcome and outcome[0]


def named(value):
    return repr(value) if isinstance(value, Criterion) else None


# Every criterion of the table: what it is fed, and the step, the reason and the sentence that are expected.
STOPS = {
    "max_iterations": (
        MaxIterations(3),
        losses(5.0, 4.0, 3.0, 2.0),
        (3, LIMIT, "MaxIterations: step 3 reached the limit of 3"),
    ),
    "max_evaluations": (
        MaxEvaluations(5),
        script(evaluations=[3, 6, 9]),
        (2, LIMIT, "MaxEvaluations: 6 evaluations of the loss at step 2 reached the limit of 5"),
    ),
    "wall_time": (
        WallTime(60),
        script(seconds=[0.0, 59.5, 60.25, 70.0]),
        (3, LIMIT, "WallTime: 60.25 s at step 3 reached the limit of 60 s"),
    ),
    "loss_below": (
        LossBelow(0.5),
        losses(2.0, 0.75, 0.25, 0.125),
        (3, CONVERGED, "LossBelow: the loss 0.25 at step 3 is at most 0.5"),
    ),
    "loss_below, negative": (
        LossBelow(-10),
        losses(-1.0, 3.0, -12.5),
        (3, CONVERGED, "LossBelow: the loss -12.5 at step 3 is at most -10"),
    ),
    "loss_change_below": (
        LossChangeBelow(0.01),
        losses(1.0, 0.5, 0.495),
        (
            3,
            CONVERGED,
            "LossChangeBelow: the loss changed by 0.005 at step 3, at most the tolerance 0.01 (atol=0.01, rtol=0)",
        ),
    ),
    "loss_change_below, relative": (
        LossChangeBelow(0.0, rtol=0.125),
        losses(64.0, 48.0, 44.0),
        (
            3,
            CONVERGED,
            "LossChangeBelow: the loss changed by 4 at step 3, at most the tolerance 5.5 (atol=0, rtol=0.125)",
        ),
    ),
    "loss_change_below, relative, negative": (
        LossChangeBelow(0.5, rtol=0.125),
        losses(-16.0, -64.0, -72.0),
        (
            3,
            CONVERGED,
            "LossChangeBelow: the loss changed by 8 at step 3, at most the tolerance 9.5 (atol=0.5, rtol=0.125)",
        ),
    ),
    "gradient_norm_below": (
        GradientNormBelow(0.5),
        script(gradient_norm=[1.0, 0.25], gradient_norm_inf=[0.1, 0.1]),
        (2, CONVERGED, "GradientNormBelow: the gradient norm 0.25 (ord=2) at step 2 is at most 0.5"),
    ),
    "gradient_norm_below, inf": (
        GradientNormBelow(0.5, ord=math.inf),
        script(gradient_norm=[0.1, 0.1], gradient_norm_inf=[1.0, 0.25]),
        (2, CONVERGED, "GradientNormBelow: the gradient norm 0.25 (ord=inf) at step 2 is at most 0.5"),
    ),
    "variables_change_below": (
        VariablesChangeBelow(0.5),
        script(variables_change=[2.0, 0.25], variables_scale=[8.0, 8.0]),
        (
            2,
            CONVERGED,
            "VariablesChangeBelow: the variables changed by at most 0.25 at step 2, within the tolerance 0.5"
            " (atol=0.5, rtol=0)",
        ),
    ),
    "variables_change_below, relative": (
        VariablesChangeBelow(0.5, rtol=0.25),
        script(variables_change=[3.0, 2.0], variables_scale=[8.0, 8.0]),
        (
            2,
            CONVERGED,
            "VariablesChangeBelow: the variables changed by at most 2 at step 2, within the tolerance 2.5"
            " (atol=0.5, rtol=0.25)",
        ),
    ),
    "loss_plateau": (
        LossPlateau(2),
        losses(3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 0.0),
        (6, CONVERGED, "LossPlateau: no loss better than 1 by more than 0 for 2 steps at step 6"),
    ),
    "loss_plateau, min_delta": (
        LossPlateau(3, min_delta=0.5),
        losses(4.0, 3.75, 3.5, 3.25, 3.0, 2.8, 2.75, 2.0),
        (7, CONVERGED, "LossPlateau: no loss better than 3.25 by more than 0.5 for 3 steps at step 7"),
    ),
    "loss_plateau, negative": (
        LossPlateau(2),
        losses(-1.0, -2.0, -1.5, -2.0, -3.0),
        (4, CONVERGED, "LossPlateau: no loss better than -2 by more than 0 for 2 steps at step 4"),
    ),
    "non_finite, nan": (
        NonFinite(),
        losses(1.0, NAN),
        (2, NOT_FINITE, "NonFinite: the loss is nan at step 2"),
    ),
    "non_finite, infinite": (
        NonFinite(),
        losses(1.0, -INF),
        (2, NOT_FINITE, "NonFinite: the loss is -inf at step 2"),
    ),
    "non_finite, gradient": (
        NonFinite(),
        script(loss=[1.0, 0.5], gradients_finite=[True, False]),
        (2, NOT_FINITE, "NonFinite: a gradient is not finite at step 2, where the loss is 0.5"),
    ),
    "any_of": (
        LossBelow(0.5) | MaxIterations(5),
        losses(2.0, 1.0, 0.25),
        (3, CONVERGED, "LossBelow: the loss 0.25 at step 3 is at most 0.5"),
    ),
    "any_of, the other": (
        LossBelow(0.5) | MaxIterations(2),
        losses(2.0, 1.0, 0.25),
        (2, LIMIT, "MaxIterations: step 2 reached the limit of 2"),
    ),
    "any_of, both": (
        MaxIterations(3) | LossBelow(0.5),
        losses(2.0, 1.0, 0.25),
        (
            3,
            CONVERGED,
            "MaxIterations: step 3 reached the limit of 3; LossBelow: the loss 0.25 at step 3 is at most 0.5",
        ),
    ),
    "all_of": (
        LossBelow(0.5) & GradientNormBelow(0.125),
        script(loss=[0.25, 0.75, 0.25], gradient_norm=[1.0, 0.0625, 0.0625]),
        (
            3,
            CONVERGED,
            "LossBelow: the loss 0.25 at step 3 is at most 0.5"
            " and GradientNormBelow: the gradient norm 0.0625 (ord=2) at step 3 is at most 0.125",
        ),
    ),
    "for_steps": (
        LossBelow(0.5).for_steps(2),
        losses(0.25, 1.0, 0.25, 0.125),
        (4, CONVERGED, "LossBelow: the loss 0.125 at step 4 is at most 0.5, for 2 consecutive steps"),
    ),
    "after": (
        LossBelow(0.5).after(3),
        losses(0.25, 0.25, 0.125, 0.0),
        (3, CONVERGED, "LossBelow: the loss 0.125 at step 3 is at most 0.5"),
    ),
    "after, keeps its state up to date": (
        LossPlateau(2).after(4),
        losses(1.0, 1.0, 1.0, 1.0),
        (4, CONVERGED, "LossPlateau: no loss better than 1 by more than 0 for 3 steps at step 4"),
    ),
    "nested: any in all": (
        (LossBelow(0.5) | WallTime(9)) & MaxIterations(2),
        script(loss=[0.25, 1.0, 1.0], seconds=[0.0, 1.0, 9.0]),
        (3, LIMIT, "WallTime: 9 s at step 3 reached the limit of 9 s and MaxIterations: step 3 reached the limit of 2"),
    ),
    "nested: all in any": (
        MaxIterations(9) | (LossBelow(0.5) & GradientNormBelow(1.0)),
        script(loss=[1.0, 0.25], gradient_norm=[0.5, 0.5]),
        (
            2,
            CONVERGED,
            "LossBelow: the loss 0.25 at step 2 is at most 0.5"
            " and GradientNormBelow: the gradient norm 0.5 (ord=2) at step 2 is at most 1",
        ),
    ),
    "nested: any, for steps, after": (
        (LossBelow(0.5) | GradientNormBelow(0.5)).for_steps(2).after(4),
        script(loss=[0.25, 0.25, 0.25, 1.0], gradient_norm=[1.0, 1.0, 1.0, 0.25]),
        (
            4,
            CONVERGED,
            "GradientNormBelow: the gradient norm 0.25 (ord=2) at step 4 is at most 0.5, for 2 consecutive steps",
        ),
    ),
    "nested: after, for steps": (
        LossBelow(0.5).after(3).for_steps(2),
        losses(0.25, 0.25, 0.25, 0.25),
        (4, CONVERGED, "LossBelow: the loss 0.25 at step 4 is at most 0.5, for 2 consecutive steps"),
    ),
}
CRITERIA = [criterion for criterion, _, _ in STOPS.values()]


@pytest.mark.parametrize(("criterion", "scripted", "expected"), STOPS.values(), ids=STOPS)
def test_a_criterion_stops_at_its_step_and_says_why(criterion, scripted, expected):
    assert play(criterion, scripted) == expected


def test_the_table_has_every_criterion():
    tabled = {type(part) for criterion in CRITERIA for part in (criterion, *criterion.parts())}
    public = {getattr(tk.stopping, name) for name in tk.stopping.__all__}
    assert tabled == {item for item in public if isinstance(item, type) and issubclass(item, Criterion)} - {Criterion}


@pytest.mark.parametrize(
    ("criterion", "at", "beyond"),
    [
        (LossBelow(0.5), losses(0.5), losses(np.nextafter(0.5, 1))),
        (LossBelow(-0.5), losses(-0.5), losses(np.nextafter(-0.5, 0))),
        (LossBelow(0.0), losses(-0.0), losses(np.finfo(float).tiny)),
        (LossChangeBelow(0.25), losses(1.0, 0.75), losses(1.0, np.nextafter(0.75, 0))),
        (LossChangeBelow(0.25), losses(-1.0, -0.75), losses(-1.0, np.nextafter(-0.75, 0))),
        (LossChangeBelow(0.0), losses(1.0, 1.0), losses(1.0, np.nextafter(1, 0))),
        (LossChangeBelow(0.25, 0.25), losses(5.25, 4.0), losses(np.nextafter(5.25, 6), 4.0)),
        (LossChangeBelow(0.25, 0.25), losses(-5.25, -4.0), losses(np.nextafter(-5.25, -6), -4.0)),
        (GradientNormBelow(0.5), script(gradient_norm=[0.5]), script(gradient_norm=[np.nextafter(0.5, 1)])),
        (
            GradientNormBelow(0.5, INF),
            script(gradient_norm_inf=[0.5]),
            script(gradient_norm_inf=[np.nextafter(0.5, 1)]),
        ),
        (
            VariablesChangeBelow(0.25, 0.25),
            script(variables_change=[1.25], variables_scale=[4.0]),
            script(variables_change=[np.nextafter(1.25, 2)], variables_scale=[4.0]),
        ),
        (WallTime(0.5), script(seconds=[0.5]), script(seconds=[np.nextafter(0.5, 0)])),
        (MaxEvaluations(5), script(evaluations=[5]), script(evaluations=[4])),
        # No new best by *more* than min_delta: one by exactly min_delta is none.
        (LossPlateau(1, min_delta=0.5), losses(1.0, 0.5), losses(1.0, np.nextafter(0.5, 0))),
        (LossPlateau(1), losses(1.0, 1.0), losses(1.0, np.nextafter(1, 0))),
    ],
    ids=named,
)
def test_a_threshold_belongs_to_the_side_that_stops(criterion, at, beyond):
    assert stops_at(criterion, at) == at[-1]["step"]
    assert play(criterion, beyond) is None


@pytest.mark.parametrize("first", [0.0, -0.0, 1e-300, 3.0, -3.0])
@pytest.mark.parametrize("criterion", [LossChangeBelow(1e6), LossChangeBelow(0.0), LossChangeBelow(1.0, rtol=1e6)])
def test_the_first_loss_has_not_changed(criterion, first):
    assert stops_at(criterion, losses(first, first)) == 2


@pytest.mark.parametrize("worst", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "criterion",
    [LossChangeBelow(1e-3, rtol=1e-3), LossChangeBelow(1e-3), LossPlateau(2), VariablesChangeBelow(1e-3, rtol=1e-3)],
    ids=named,
)
def test_values_that_are_not_finite_are_no_convergence(criterion, worst):
    logs = script(loss=[1.0, worst], variables_change=[1.0, abs(worst)], variables_scale=[1.0, abs(worst)])
    assert play(criterion, logs) is None


def test_variables_that_did_not_move_at_the_first_step_are_a_stop():
    assert stops_at(VariablesChangeBelow(0.0), script(variables_change=[0.0], variables_scale=[1.0])) == 1


def test_a_step_that_does_not_hold_begins_the_count_of_for_steps_again():
    values = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert stops_at(LossBelow(0.5).for_steps(3), losses(*values)) == 6
    assert play(LossBelow(0.5).for_steps(4), losses(*values)) is None


def test_all_of_wants_the_same_step():
    logs = script(loss=[0.0, 1.0, 0.0, 1.0], gradient_norm=[1.0, 0.0, 1.0, 0.0])
    assert play(LossBelow(0.5) & GradientNormBelow(0.5), logs) is None


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_after_says_the_first_step_that_counts(n):
    assert stops_at(LossBelow(0.5).after(n), losses(0.0, 0.0, 0.0, 0.0)) == n


a, b, c, d = LossBelow(1.0), MaxIterations(10), GradientNormBelow(1e-3), NonFinite()


@pytest.mark.parametrize(
    ("combined", "criteria"),
    [
        (a | b | c, (a, b, c)),
        (a | (b | c), (a, b, c)),
        ((a | b) | (c | d), (a, b, c, d)),
        ((a & b) | c, (a & b, c)),
        (a | "non_finite", (a, d)),
        (a | {"class_name": "max_iterations", "config": {"n": 10}}, (a, b)),
    ],
)
def test_or_makes_one_flat_any_of(combined, criteria):
    assert type(combined) is AnyOf
    assert combined.criteria == criteria


@pytest.mark.parametrize(
    ("combined", "criteria"),
    [
        (a & b & c, (a, b, c)),
        (a & (b & c), (a, b, c)),
        ((a & b) & (c & d), (a, b, c, d)),
        ((a | b) & c, (a | b, c)),
    ],
)
def test_and_makes_one_flat_all_of(combined, criteria):
    assert type(combined) is AllOf
    assert combined.criteria == criteria


def test_or_binds_weaker_than_and():
    assert a | b & c == AnyOf([a, AllOf([b, c])])
    assert a & b | c == AnyOf([AllOf([a, b]), c])


def test_a_list_stops_with_any_of_its_criteria_and_a_list_of_one_is_that_one():
    assert tk.stopping.get([a, "non_finite"]) == a | d
    assert tk.stopping.get((a,)) is a


def test_the_parts_of_a_combination_are_its_elementary_criteria():
    assert ((a | b).for_steps(2) & c.after(3) | d).parts() == (a, b, c, d)


@pytest.mark.parametrize(
    ("criterion", "needs"),
    [
        (MaxIterations(1) | MaxEvaluations(1) | LossBelow(1) | LossChangeBelow(1) | LossPlateau(1), set()),
        (WallTime(1).after(3), {"seconds"}),
        (GradientNormBelow(1).for_steps(2), {"gradient_norm"}),
        (GradientNormBelow(1, INF) & NonFinite(), {"gradient_norm_inf", "gradients_finite"}),
        (LossBelow(1) | VariablesChangeBelow(1).after(2), {"variables_change", "variables_scale"}),
    ],
    ids=named,
)
def test_a_combination_needs_what_its_parts_need_and_nothing_else(criterion, needs):
    assert criterion.needs == needs


@pytest.mark.parametrize(
    ("criterion", "logs", "reason"),
    [
        (MaxIterations(1) | LossBelow(0.0), losses(0.0), CONVERGED),
        (LossBelow(0.0) | MaxIterations(1), losses(0.0), CONVERGED),
        (MaxIterations(1) | WallTime(1), script(seconds=[2.0]), LIMIT),
        (MaxIterations(1) | NonFinite() | LossBelow(0.0), losses(-INF), NOT_FINITE),
        (LossBelow(0.0) | NonFinite(), losses(-INF), NOT_FINITE),
        (MaxIterations(1) & LossBelow(0.0), losses(0.0), CONVERGED),
        (MaxIterations(1) & MaxEvaluations(1), losses(0.0), LIMIT),
        (LossBelow(0.0) & NonFinite(), losses(-INF), NOT_FINITE),
        (MaxIterations(1).for_steps(1), losses(0.0), LIMIT),
        (NonFinite().after(1), losses(NAN), NOT_FINITE),
        ((MaxIterations(1) | LossBelow(0.0)).for_steps(1).after(1), losses(0.0), CONVERGED),
        ((MaxIterations(1) | LossBelow(0.0)).for_steps(1).after(1), losses(1.0), LIMIT),
    ],
    ids=named,
)
def test_the_reason_of_a_combination_is_the_weightiest_of_the_parts_that_fired(criterion, logs, reason):
    assert play(criterion, logs)[1] is reason


def test_a_criterion_that_is_named_twice_speaks_once():
    assert play(NonFinite() | NonFinite(), losses(NAN))[2] == "NonFinite: the loss is nan at step 1"


@pytest.mark.parametrize("criterion", CRITERIA, ids=STOPS)
def test_a_criterion_is_immutable(criterion):
    name = dataclasses.fields(criterion)[0].name if dataclasses.fields(criterion) else "anything"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(criterion, name, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(criterion, name)


@pytest.mark.parametrize(("criterion", "scripted", "expected"), STOPS.values(), ids=STOPS)
def test_a_criterion_holds_no_state_between_runs(criterion, scripted, expected):
    before = dict(vars(criterion)), repr(criterion), criterion.init()
    assert [play(criterion, scripted), play(criterion, scripted)] == [expected, expected]
    assert (dict(vars(criterion)), repr(criterion), criterion.init()) == before


@pytest.mark.parametrize(("criterion", "scripted", "expected"), STOPS.values(), ids=STOPS)
def test_update_is_a_pure_function_of_state_and_logs(criterion, scripted, expected):
    """Two runs whose steps alternate do not see each other, and a step that is asked for twice is the same."""
    state = other = begin(criterion)
    for logs in scripted[: expected[0]]:
        kept = tree.map_structure(lambda leaf: leaf.numpy().item(), state)
        again, _ = update(criterion, state, logs)
        other, other_stop = update(criterion, other, logs)
        assert tree.map_structure(lambda leaf: leaf.numpy().item(), state) == kept
        state, stop = update(criterion, state, logs)
        assert str(state) == str(again) == str(other)
        assert stop is other_stop is (logs["step"] == expected[0])


def must_be(argument, right, received):
    return f"`{argument}` must be {right}, received {received}."


KIND = "a Criterion, its name or its configuration"
INTEGER, REAL = "an integer of at least 1", "a number of at least 0"


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: MaxIterations(0), ValueError, must_be("n", INTEGER, "0")),
        (lambda: MaxIterations(-3), ValueError, must_be("n", INTEGER, "-3")),
        (lambda: MaxIterations(1e3), TypeError, must_be("n", INTEGER, "the float 1000.0")),
        (lambda: MaxIterations(True), TypeError, must_be("n", INTEGER, "True")),
        (lambda: MaxIterations("3"), TypeError, must_be("n", INTEGER, "'3'")),
        (lambda: MaxIterations(None), TypeError, must_be("n", INTEGER, "None")),
        (lambda: MaxEvaluations(0), ValueError, must_be("n", INTEGER, "0")),
        (lambda: MaxEvaluations([3]), TypeError, must_be("n", INTEGER, "a list of 1")),
        (lambda: WallTime(-1), ValueError, must_be("seconds", REAL, "-1")),
        (lambda: WallTime(NAN), ValueError, must_be("seconds", REAL, "nan")),
        (lambda: WallTime("1 min"), TypeError, must_be("seconds", REAL, "'1 min'")),
        (lambda: LossBelow(NAN), ValueError, must_be("value", "a number", "nan")),
        (lambda: LossBelow(1j), TypeError, must_be("value", "a number", "the complex 1j")),
        (lambda: LossBelow(False), TypeError, must_be("value", "a number", "False")),
        (lambda: LossChangeBelow(-1e-9), ValueError, must_be("atol", REAL, "-1e-09")),
        (lambda: LossChangeBelow(None), TypeError, must_be("atol", REAL, "None")),
        (lambda: LossChangeBelow(0, rtol=-1), ValueError, must_be("rtol", REAL, "-1")),
        (lambda: LossChangeBelow(0, rtol=NAN), ValueError, must_be("rtol", REAL, "nan")),
        (lambda: GradientNormBelow(-1), ValueError, must_be("tol", REAL, "-1")),
        (lambda: GradientNormBelow(1, ord=1), ValueError, must_be("ord", "2 or math.inf", "the int 1")),
        (lambda: GradientNormBelow(1, ord="max"), ValueError, must_be("ord", "2 or math.inf", "'max'")),
        (lambda: GradientNormBelow(1, ord=None), ValueError, must_be("ord", "2 or math.inf", "None")),
        (lambda: GradientNormBelow(1, ord=[2]), ValueError, must_be("ord", "2 or math.inf", "a list of 1")),
        (
            lambda: GradientNormBelow(np.ones(3)),
            TypeError,
            must_be("tol", REAL, "a NumPy array of shape (3,) and dtype float64"),
        ),
        (lambda: VariablesChangeBelow(-1), ValueError, must_be("atol", REAL, "-1")),
        (lambda: VariablesChangeBelow(0, rtol="1"), TypeError, must_be("rtol", REAL, "'1'")),
        (lambda: LossPlateau(0), ValueError, must_be("patience", INTEGER, "0")),
        (lambda: LossPlateau(2.0), TypeError, must_be("patience", INTEGER, "the float 2.0")),
        (lambda: LossPlateau(2, min_delta=-1), ValueError, must_be("min_delta", REAL, "-1")),
        (lambda: a.for_steps(0), ValueError, must_be("n", INTEGER, "0")),
        (lambda: a.for_steps(1.0), TypeError, must_be("n", INTEGER, "the float 1.0")),
        (lambda: a.after(0), ValueError, must_be("n", INTEGER, "0")),
        (lambda: ForSteps(3, 3), TypeError, must_be("stopping", KIND, "the int 3")),
        (lambda: After(None, 3), TypeError, must_be("stopping", KIND, "None")),
        (lambda: a | 3, TypeError, must_be("stopping", KIND, "the int 3")),
        (lambda: a & None, TypeError, must_be("stopping", KIND, "None")),
        (lambda: AnyOf([]), ValueError, "`criteria` must hold at least one criterion, received none."),
        (lambda: AllOf(a), TypeError, must_be("criteria", "a list of criteria", "an object of type LossBelow")),
        (lambda: AnyOf("non_finite"), TypeError, must_be("criteria", "a list of criteria", "'non_finite'")),
        (
            lambda: AnyOf([a, LossBelow]),
            TypeError,
            must_be("stopping", KIND, "the class LossBelow: write LossBelow(...) to make an instance"),
        ),
    ],
)
def test_a_bad_argument_is_refused_in_one_sentence(make, kind, sentence):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert (caught.type, str(caught.value)) == (kind, sentence)


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (MaxIterations(np.int32(3)), "MaxIterations(n=3)"),
        (LossBelow(np.float32(0.5)), "LossBelow(value=0.5)"),
        (WallTime(2), "WallTime(seconds=2.0)"),
        (GradientNormBelow(1, ord=2.0), "GradientNormBelow(tol=1.0, ord=2)"),
        (GradientNormBelow(1, ord="inf"), "GradientNormBelow(tol=1.0, ord=inf)"),
        (GradientNormBelow(1, ord=np.inf), "GradientNormBelow(tol=1.0, ord=inf)"),
    ],
)
def test_numbers_of_any_kind_are_kept_as_plain_ones(given, same):
    assert repr(given) == same


# In runs: under each driver. The steps of SGD with 0.25 halve the distance to 4, so that every value is exact:
# at step t the loss is 2 ** (7 - 2 t), each gradient -(2 ** (4 - t)), each change 2 ** (2 - t).

DRIVERS = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
}
x = tf.Variable(0.0, dtype=tf.float64, name="x")
y = keras.Variable(0.0, dtype="float32", name="y")


def distance():
    return (x - 4.0) ** 2 + tf.cast((y - 4.0) ** 2, tf.float64)


def play_run(loop):
    x.assign(0.0)
    y.assign(0.0)
    result = loop.minimize(distance, [x, y])
    return result.steps, result.reason, result.message


RUNS = {
    "max_iterations": (MaxIterations(7), 7, LIMIT, "MaxIterations: step 7 reached the limit of 7"),
    "max_evaluations": (
        MaxEvaluations(7),
        7,
        LIMIT,
        "MaxEvaluations: 7 evaluations of the loss at step 7 reached the limit of 7",
    ),
    "loss_below": (LossBelow(2.0**-5), 6, CONVERGED, "LossBelow: the loss 0.03125 at step 6 is at most 0.03125"),
    "loss_change_below": (
        LossChangeBelow(2.0**-5, rtol=2),
        6,
        CONVERGED,
        "LossChangeBelow: the loss changed by 0.0938 at step 6, at most the tolerance 0.0938 (atol=0.03125, rtol=2)",
    ),
    "gradient_norm_below, 2": (
        GradientNormBelow(0.25),
        7,
        CONVERGED,
        "GradientNormBelow: the gradient norm 0.177 (ord=2) at step 7 is at most 0.25",
    ),
    "gradient_norm_below, inf": (
        GradientNormBelow(0.25, ord=math.inf),
        6,
        CONVERGED,
        "GradientNormBelow: the gradient norm 0.25 (ord=inf) at step 6 is at most 0.25",
    ),
    "variables_change_below": (
        VariablesChangeBelow(2.0**-4),
        6,
        CONVERGED,
        "VariablesChangeBelow: the variables changed by at most 0.0625 at step 6, within the tolerance 0.0625"
        " (atol=0.0625, rtol=0)",
    ),
    "variables_change_below, relative": (
        VariablesChangeBelow(0, rtol=2.0**-6),
        7,
        CONVERGED,
        "VariablesChangeBelow: the variables changed by at most 0.0312 at step 7, within the tolerance 0.062"
        " (atol=0, rtol=0.015625)",
    ),
    "loss_plateau": (
        LossPlateau(2, min_delta=2.0**-3),
        7,
        CONVERGED,
        "LossPlateau: no loss better than 0.125 by more than 0.125 for 2 steps at step 7",
    ),
    "any_of": (
        LossBelow(2.0**-5) | MaxIterations(9) | GradientNormBelow(1e-9),
        6,
        CONVERGED,
        "LossBelow: the loss 0.03125 at step 6 is at most 0.03125",
    ),
    "all_of": (
        LossBelow(2.0**-5) & VariablesChangeBelow(2.0**-5),
        7,
        CONVERGED,
        "LossBelow: the loss 0.0078125 at step 7 is at most 0.03125 and VariablesChangeBelow: the variables changed"
        " by at most 0.0312 at step 7, within the tolerance 0.0312 (atol=0.03125, rtol=0)",
    ),
    "for_steps, after": (
        LossBelow(2.0**-5).for_steps(3).after(9),
        9,
        CONVERGED,
        "LossBelow: the loss 0.000488281 at step 9 is at most 0.03125, for 3 consecutive steps",
    ),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("criterion", "step", "reason", "message"), RUNS.values(), ids=RUNS)
def test_every_driver_stops_at_the_same_step_with_the_same_sentence_run_after_run(
    driver, criterion, step, reason, message
):
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), stopping=criterion, **DRIVERS[driver])
    first = play_run(loop)
    assert first == (step, reason, message)
    assert play_run(loop) == first
    assert x.numpy() == y.value.numpy() == 4 - 2.0 ** (2 - step)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("loss", "start", "step", "message"),
    [
        (lambda: tf.math.log(x), 1.0, 4, "NonFinite: the loss is nan at step 4"),
        (lambda: 1 / x, 0.0, 1, "NonFinite: the loss is inf at step 1"),
        (lambda: tf.sqrt(x), 0.0, 1, "NonFinite: a gradient is not finite at step 1, where the loss is 0"),
    ],
)
def test_every_driver_stops_where_something_is_not_finite_and_never_calls_it_convergence(
    driver, loss, start, step, message
):
    x.assign(start)
    easy = [VariablesChangeBelow(0, rtol=1e300), LossChangeBelow(0, rtol=1e300), GradientNormBelow(0, ord=math.inf)]
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(0.25),
        stopping=AllOf([*easy, MaxIterations(step)]),
        max_iterations=step + 5,
        **DRIVERS[driver],
    )
    result = loop.minimize(loss, [x])
    assert (result.steps, result.reason, result.converged) == (step, NOT_FINITE, False)
    assert result.message.startswith(message)


class Descending(Criterion):
    """A criterion of a user: an array in its state, and a value that the objective returns beside the loss."""

    def __init__(self, steps):
        self.steps = steps

    def init(self):
        return {"last": np.full(2, np.inf), "count": 0}

    def update(self, state, logs):
        pair = tf.stack([logs["loss"], logs["half"]])
        count = tf.where(tf.reduce_all(pair < state["last"]), state["count"] + 1, 0)
        return {"last": pair, "count": count}, count >= self.steps

    def message(self, state, logs):
        return f"down to {logs['half']} for {state['count']} steps, last {state['last'].tolist()}"


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_criterion_of_a_user_runs_under_every_driver_and_combines(driver):
    rule = Descending(5).after(7) & LossBelow(100)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), stopping=rule, max_iterations=50, **DRIVERS[driver])
    sentence = "Descending: down to 0.5 for 7 steps, last [1.0, 0.5] and LossBelow: the loss 1 at step 7 is at most 100"

    def loss():
        return x**2, {"half": x**2 / 2}

    for _ in range(2):
        x.assign(64.0)
        result = loop.minimize(loss, [x])
        assert (result.steps, result.message) == (7, sentence)


# Exact early exit: with SGD(1) and the loss x, step t finds the loss start - (t - 1) and leaves start - t.


def identity():
    return x


def countdown(criterion, execution, **driver):
    return tk.OptimizationLoop(
        keras.optimizers.SGD(1.0),
        stopping=criterion,
        max_iterations=10_000,
        measures={"x": lambda: x},
        steps_per_execution=execution,
        **driver,
    )


@pytest.mark.parametrize("execution", [1, 7, 256, "auto"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_the_variables_are_those_of_the_step_at_which_a_criterion_is_met(driver, execution):
    loop = countdown(LossBelow(0.0), execution, **DRIVERS[driver])
    for last in (137, 1, 7, 8) if driver == "eager" else (137, 1, 6, 7, 8, 255, 256, 257):
        x.assign(last - 1.0)
        result = loop.minimize(identity, [x])
        assert (result.steps, result.message) == (last, f"LossBelow: the loss 0 at step {last} is at most 0")
        assert x.numpy() == result.variables[0] == result.loss == -1.0
        np.testing.assert_array_equal(result.history["loss"], np.arange(last - 1.0, -1.0, -1.0))
        np.testing.assert_array_equal(result.history["x"], np.arange(last - 2.0, -2.0, -1.0))


@pytest.mark.parametrize("execution", [1, 7, 256, "auto"])
@pytest.mark.parametrize(
    "criterion",
    [
        MaxIterations(137),
        MaxEvaluations(137),
        LossBelow(-134).for_steps(3),
        LossBelow(-20).after(137),
        LossPlateau(136, min_delta=1000),
        (LossBelow(-136) & VariablesChangeBelow(1.0)) | GradientNormBelow(0.5),
        VariablesChangeBelow(0.0, rtol=1 / 137),
    ],
    ids=named,
)
def test_every_criterion_leaves_the_variables_of_step_137(criterion, execution):
    x.assign(0.0)
    result = countdown(criterion, execution, jit_compile=False).minimize(identity, [x])
    assert (result.steps, x.numpy(), len(result.history["loss"])) == (137, -137.0, 137)


# Wall time: by a clock of our own, and once by the real one.


@pytest.mark.parametrize("driver", DRIVERS)
def test_wall_time_begins_with_the_run_and_again_with_the_next_one(driver, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def tick(step, logs):
        nonlocal now
        now += 0.125

    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(0.25), stopping=WallTime(0.5), max_iterations=100, callbacks=[tick], **DRIVERS[driver]
    )
    now += 3600
    expected = 5, LIMIT, "WallTime: 0.5 s at step 5 reached the limit of 0.5 s"
    assert play_run(loop) == expected
    now += 3600
    assert play_run(loop) == expected


@pytest.mark.parametrize("driver", DRIVERS)
def test_no_time_at_all_is_one_step(driver):
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), stopping=WallTime(0), **DRIVERS[driver])
    assert play_run(loop)[:2] == (1, LIMIT)


@pytest.mark.parametrize("driver", ["graph", "xla"])
def test_a_run_ends_a_tenth_of_a_second_after_its_wall_time_at_the_latest(driver):
    z = tf.Variable(tf.ones(2000, tf.float64))
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(1e-9), stopping=WallTime(0.2), max_iterations=10**9, **DRIVERS[driver]
    )

    def loss():
        return tf.reduce_sum(tf.cos(z))

    loop.minimize(loss, [z])  # compiles
    runs = [loop.minimize(loss, [z]) for _ in range(3)]
    assert all(run.reason is LIMIT and run.steps > 100 and run.seconds >= 0.2 for run in runs)
    assert min(run.seconds for run in runs) < 0.3  # the least, since a busy machine may hold up one of them
