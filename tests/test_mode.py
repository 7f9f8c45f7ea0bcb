import itertools

import pytest

from kernelswap import mode
from kernelswap.errors import ModeError
from kernelswap.types import Mode, Run

INF, TRAIN, COMP, FALL = Mode.INFERENCE, Mode.TRAINING, Mode.TORCH_COMPILE, Mode.FALLBACK
EVERY = [Mode(sum(m.value for m in some)) for n in range(5) for some in itertools.combinations(Mode, n)]


@pytest.mark.parametrize(
    ("asked", "tried"),
    [
        (INF, (INF, INF | COMP, TRAIN, TRAIN | COMP, FALL)),
        (TRAIN, (TRAIN, TRAIN | COMP, FALL)),
        (INF | COMP, (INF | COMP, TRAIN | COMP, FALL)),
        (TRAIN | COMP, (TRAIN | COMP, FALL)),
    ],
)
def test_a_kernel_that_can_do_more_serves_and_the_closest_is_first(asked, tried):
    assert mode.order(asked) == tried


def test_training_and_compilation_are_never_served_by_less():
    for asked in (INF, TRAIN, INF | COMP, TRAIN | COMP):
        for tried in mode.order(asked):
            assert tried == FALL or ((TRAIN not in asked or TRAIN in tried) and (COMP not in asked or COMP in tried))


def test_every_mode_that_is_tried_may_be_registered():
    for asked in (INF, TRAIN, INF | COMP, TRAIN | COMP):
        assert [mode.check(m) for m in mode.order(asked)] == list(mode.order(asked))


def test_which_combinations_mean_something():
    legal = [m for m in EVERY if not isinstance(caught(mode.check, m), ModeError)]
    assert set(legal) == {INF, TRAIN, COMP, FALL, INF | COMP, TRAIN | COMP}
    assert {m for m in EVERY if not isinstance(caught(mode.wanted, m), ModeError)} == {INF, TRAIN, INF | COMP, TRAIN | COMP}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Mode(0), "an empty mode means nothing"),
        (Mode(INF.value + TRAIN.value), "INFERENCE | TRAINING: INFERENCE and TRAINING exclude each other"),
        (Mode(FALL.value + INF.value), "FALLBACK | INFERENCE: FALLBACK stands alone"),
    ],
)
def test_the_error_names_the_combination(bad, reason):
    error = caught(mode.check, bad)
    assert error.reason == reason
    assert isinstance(error, ValueError)  # what callers of the field's loaders catch
    assert error.todo


@pytest.mark.parametrize(("one", "other"), [(INF, TRAIN), (TRAIN, INF), (FALL, INF), (COMP, FALL), (INF | COMP, TRAIN)])
def test_what_means_nothing_cannot_be_combined(one, other):
    with pytest.raises(ModeError, match=r"exclude each other|stands alone"):
        one | other


@pytest.mark.parametrize("bad", [COMP, FALL])
def test_a_model_is_kernelized_for_inference_or_training(bad):
    assert caught(mode.order, bad).reason == f"{mode.name(bad)} does not say whether the model infers or trains"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_run_and_mode_are_two_words_for_one_thing(training, compiled):
    run = Run(training=training, compiled=compiled)
    assert mode.to_run(mode.from_run(run)) == run
    assert mode.from_run(run) in (INF, TRAIN, INF | COMP, TRAIN | COMP)


def test_names_are_stable():
    assert mode.name(TRAIN | COMP) == "TRAINING | TORCH_COMPILE"
    assert mode.name(Mode(0)) == "no mode"


def caught(function, *args):
    try:
        return function(*args)
    except ModeError as e:
        return e
