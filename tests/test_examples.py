"""The examples run as a user runs them, and print what they say they show."""

import functools
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from children import CONTEXT

EXAMPLES = {path.stem: path for path in (Path(__file__).parents[1] / "examples").glob("*.py")}

# For each example: patterns that must be printed in this order, and the numbers that their groups must
# match to 0.1 %. Those of the quickstart follow from x_t = 4 - 4 * 0.4**t.
PRINTED = {
    "intermediate_gradients": [
        (r"^A plain tape:\nRuntimeError: A non-persistent GradientTape can only be used to compute one set of .*$", ()),
        (r"^dy/dz = (\S+), dy/dx = (\S+), d2y/dx2 = (\S+)$", (-6.0, -6.0, 2.0)),
        (r"^all: z (\S+), x (\S+)$", (-6.0, -6.0)),
        (r"^TapeReleasedError: .*: take gradients inside the block and keep them\.$", ()),
        (r"^ +1 +(\S+) +(\S+) +(\S+) +(\S+)$", (9.0, -6.0, -6.0, 6.0)),
        (r"^ +5 +(\S+) +(\S+) +(\S+) +(\S+)$", (9 / 4**4, -6 / 2**4, -6 / 2**4, 6 / 2**4)),
        (r"^gradient: None\neagerly: the source is a constant to the tape, which does not watch it: ", ()),
        (r"^in a tf.function: the gradient ends on the way from the variable 'x' to .*, in tf.stop_gradient$", ()),
    ],
    "quickstart": [
        (r"^MinimizeStep\n +step +x +loss$", ()),
        (r"^ +1 +(\S+) +(\S+)$", (2.4, 16.0)),
        (r"^ +11 +(\S+) +(\S+)$", (4 - 4 * 0.4**11, 16 * 0.4**20)),
        (r"^stopped: LossChangeBelow: the loss changed by \S+ at step 11, at most the tolerance (\S+) ", (1e-6,)),
        (r"^TapeStep\n +step +x +loss +gradient$", ()),
        (r"^ +1 +(\S+) +(\S+) +(\S+)$", (2.4, 16.0, -8.0)),
        (r"^ +11 +(\S+) +(\S+) +(\S+)$", (4 - 4 * 0.4**11, 16 * 0.4**20, -8 * 0.4**10)),
        (r"^stopped: LossChangeBelow: the loss changed by \S+ at step 11, at most the tolerance (\S+) ", (1e-6,)),
        (r"^x = (\S+) by MinimizeStep, \1 by TapeStep$", (4 - 4 * 0.4**11,)),
        (r"^every x and every loss equal bit for bit: True$", ()),
    ],
    "custom_loop": [
        (r"^without clipping: .* error (\S+)$", (13.527,)),
        (r"^ +step +loss +norm +error$", ()),
        (r"^ +10 .* (\S+)$", (25.826,)),
        (r"^with clipping: a = (\S+), b = (\S+), error (\S+)$", (1.940, 0.911, 0.1072)),
        (r"^76 of 120 gradients were clipped, the longest from (\S+)$", (68434,)),
        (r"^stopped at step 120: the error 0\.1072 on unseen data met the target 0\.11$", ()),
    ],
    "custom_step": [
        (r"^TapeStep +jit_compile=True +(\S+) +(\S+) +(\S+) +(\S+) +301$", (3.97672, 0.251463, 0.0, 15.8776)),
        (
            r"^SAMStep +run_eagerly=True +(\S+) +(\S+) +(\S+) +(\S+) +601\n"
            r"SAMStep +jit_compile=False +\1 +\2 +\3 +\4 +601\n"
            r"SAMStep +jit_compile=True +\1 +\2 +\3 +\4 +601$",
            (1.09493, 0.946234, 0.000650159, 2.09423),
        ),
        (r"^the losses of SAM agree at every step between the drivers to (?:\de-1[3-9]|0e\+00)$", ()),
    ],
    "drop_in_fit": [
        (
            r"^  \{'run_eagerly': False\}: (?:0|\de-(?:0[6-9]|[1-9]\d)) in the weights,"
            r" (?:0|\de-(?:0[6-9]|[1-9]\d)) in loss, mae, val_loss, val_mae$",
            (),
        ),
        (r"^  \{'run_eagerly': True\}: 0 in the weights, 0 in loss, mae, val_loss, val_mae$", ()),
        (r"^LossBelow: the loss [01]\.\d+ at step \d+ is at most 2, for 3 consecutive steps$", ()),
        (r"^that is \d+ epochs of 94 steps and \d+ steps more$", ()),
        (r"^\d+ of \d+ gradients were clipped, the longest from (\S+)$", (161.6,)),
        (r"^Model.fit takes \d+\.\d times as long as loop.fit$", ()),
    ],
    "gradient_hooks": [
        (r"^plain: NonFinite: the loss is inf at step 3; not finite in its gradient: .*$", ()),
        (r"^ +step +loss +\|d growth\| +\|d inflow\|$", ()),
        (r"^ +2000 +(\S+) +\S+ +\S+$", (0.02659,)),
        (r"^ +12000 +(\S+) +\S+ +\S+$", (0.005934,)),
        (r"^clipped: growth = (\S+), inflow = (\S+), longest gradient (\S+)$", (0.901, 0.991, 3.92e7)),
        (r"^LossChangeBelow: the loss changed by \S+ at step \d+, at most the tolerance (\S+) ", (1e-12,)),
        (r"^series: 2 entries of the gradient are right$", ()),
        (
            r"^series_by_hand: the gradient must be that of the loss; at step 1 it is (\S+) for growth, where finite"
            r" differences give (\S+) and \S+ of difference is allowed; 1 of 2 checked entries are wrong\.$",
            (4.83625e7, 3.90347e7),
        ),
    ],
    "keras_callbacks": [
        (r"^ +epochs +rate +at most +at last +best loss +slope +intercept +same in file$", ()),
        (
            r"^Model.fit +61 +(\S+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+) +True\n"
            r"loop.fit +61 +\1 +\2 +\3 +\4 +\5 +\6 +True\n"
            r"loop.minimize +61 +\1 +\2 +\3 +\4 +\5 +\6 +True$",
            (0.05, 0.4, 0.01, 2.07534, 2.037, 1.064),
        ),
        (r"^step +50 +100 +150 +200$", ()),
        (r"^\|d kernel\| +(\S+) .*$", (0.7622,)),
        (r"^\|d bias\| +(\S+) .*$", (1.5917,)),
        (r"^GradientNormBelow: the gradient norm 0\.0009\d+ \(ord=2\) at step 22\d is at most (\S+)$", (0.001,)),
        (r"^slope (\S+), intercept (\S+); by numpy.polyfit (\S+) and (\S+)$", (1.653, 3.056, 1.654, 3.055)),
    ],
    "train_digits": [
        (r"^epoch +loss +accuracy +val_loss +val_accuracy$", ()),
        (r"^ +1 +(\S+) +\S+ +(\S+) +\S+$", (1.7792, 0.8633)),
        (r"^ +1\d +0\.0[345]\d\d +0\.[98]\d{3} +0\.\d+ +0\.9[4-9]\d\d$", ()),
        (r"^LossBelow: the loss 0\.0[0-4]\d+ at step \d+ is at most (\S+), for 10 consecutive steps$", (0.05,)),
        (r"^of the last epoch that is step \d+ of 34$", ()),
        (r"^on the 597 others: loss 0\.\d+, accuracy 9[6-9]\.\d %$", ()),
    ],
    "trajectories": [
        (r"^rosenbrock +steps +loss +stopped by$", ()),
        (r"^  SGD +2500 +0\.07\d* +MaxIterations: step 2500 reached the limit of 2500$", ()),
        (r"^  momentum +1[78]\d\d +\S+e-09 +LossBelow: the loss \S+e-09 at step \d+ is at most 1e-08$", ()),
        (r"^  Adagrad +2500 +0\.01\d* +MaxIterations: step 2500 reached the limit of 2500$", ()),
        (r"^  RMSprop +2500 +0\.0\d+ +MaxIterations: step 2500 reached the limit of 2500$", ()),
        (r"^  Adam +2[0-3]\d\d +\S+e-0[89] +LossBelow: the loss \S+e-09 at step \d+ is at most 1e-08$", ()),
        (r"^himmelblau +steps +loss +stopped by$", ()),
        (r"^  SGD +29 +\S+e-09 +LossBelow: the loss 9\.6\d+e-09 at step 29 is at most 1e-08$", ()),
        (r"^  momentum +26 +\S+e-09 +LossBelow: the loss 1\.9\d+e-10 at step 26 is at most 1e-08$", ()),
        (r"^  Adagrad +17 +\S+e-10 +LossBelow: the loss 3\.1\d+e-09 at step 17 is at most 1e-08$", ()),
        (r"^  RMSprop +48 +\S+e-09 +LossBelow: the loss 9\.1\d+e-09 at step 48 is at most 1e-08$", ()),
        (r"^  Adam +20\d +\S+e-0[89] +LossBelow: the loss \S+ at step 20\d is at most 1e-08$", ()),
        (r"^the picture is \S+trajectories\.png$", ()),
    ],
    "gan": [
        (r"^ step +Gaussians of 8 +samples inside\n +0 +0 +0%$", ()),
        (r"^ 4000 +[78] +[6-9]\d%\n 5000 +8 +[7-9]\d%$", ()),
        (r"^5000 steps in \S+ s; the last of 25 epochs ended at step 5000$", ()),
        (r"^the picture is \S+gan\.png$", ()),
    ],
    "curve_fitting": [
        (r"^GradientNormBelow: the gradient norm \S+ \(ord=2\) at step \d+ is at most 1e-06$", ()),
        (r"^b1 +(\S+) +(\S+) +2\.7108\d+ +2\.7070\d+ +2\.7070\d+$", (238.94213, 238.94213)),
        (r"^b2 +(\S+) +(\S+) +7\.277\d+e-06 +7\.266\d+e-06 +7\.266\d+e-06$", (5.5015643e-4, 5.5015643e-4)),
        (r"^ S +(\S+) +(\S+)$", (0.12455139, 0.12455139)),
        (r"^the picture is \S+curve_fitting\.png$", ()),
    ],
    "pinn": [
        (r"^LossBelow: the loss 0\.000\d+ at step \d+ is at most 0\.001, for 100 consecutive steps$", ()),
        (r"^step +1: residual \d\.\de\+01, largest error \d\.\de\+0[01]$", ()),
        (r"^step +\d+: residual 3\.\de-02, largest error [1-4]\.\de-03$", ()),
        (r"^the picture is \S+pinn\.png$", ()),
    ],
    "learning_rate_range_test": [
        (r"^stopped at step (?:29|30|31)\d: the loss was \d\.\d at the rate 0\.[345]\d?$", ()),
        (r"^the loss fell fastest at the rate 0\.0[2-6]\d?$", ()),
        (r"^rate +0\.00[2-6]\d?: loss +[12]\.\d\d? in the third epoch$", ()),
        (r"^rate +0\.0[2-6]\d?: loss +0\.[1-4]\d* in the third epoch$", ()),
        (r"^rate +0\.[2-6]\d?: loss +[12]\.\d\d? in the third epoch$", ()),
        (r"^the picture is \S+learning_rate_range_test\.png$", ()),
    ],
    "variational_inference": [
        (r"^ +exact +full +mean field$", ()),
        (r"^s1 +-0\.326 \+- 0\.230 +-0\.32\d \+- 0\.2[23]\d +-0\.32\d \+- 0\.03[345]$", ()),
        (r"^s2 +0\.201 \+- 0\.197 +0\.20\d \+- 0\.19\d +0\.20\d \+- 0\.03[345]$", ()),
        (r"^full: ELBO (\S+), \d+ us a step\nmean field: ELBO (\S+), \d+ us a step$", (-492.7, -495.1)),
        (r"^the picture is \S+variational_inference\.png$", ()),
    ],
    "adversarial": [
        (r"^known without a change: 9[5-9]\.\d% of 500 unseen digits$", ()),
        (r"^ +0\.05 +[67]\d\.\d% +9\d\.\d%$", ()),
        (r"^ +0\.20 +\d\.\d% +(?:8[5-9]|9\d)\.\d%$", ()),
        (r"^mean cross-entropy 0\.[01]\d before, (?:[89]|1\d)\.\d\d after 100 steps$", ()),
        (r"^the picture is \S+adversarial\.png$", ()),
    ],
    "grad_cam": [
        (r"^loss 0\.\d+; (?:8[5-9]|9\d)\.\d % of 1000 unseen digits are found$", ()),
        (r"^digits \[[\d ]{7}\]: mean heat on their ink 0\.[3-9]\d, on the other's 0\.[01]\d, on none 0\.[0-2]\d$", ()),
        (r"^digits \[[\d ]{7}\]: mean heat on their ink 0\.[3-9]\d, on the other's 0\.[01]\d, on none 0\.[0-2]\d$", ()),
        (r"^the picture is \S+grad_cam\.png$", ()),
    ],
}


def run(*arguments, folder):
    """Runs Python in a folder of its own, without the settings by which the tests quieten TensorFlow."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def without_prefix(text):
    """The lines of a log, without the time and the thread with which TensorFlow's C++ code begins them."""
    return [re.sub(r"^([IWEF])\d{4} [\d:.]+ +\d+ ", r"\1 ", line) for line in text.splitlines()]


@functools.cache
def import_noise():
    """What TensorFlow itself writes when it is imported, which some versions let nobody switch off."""
    quiet = "import os; os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'; import tensorflow"
    return {*without_prefix(run("-c", quiet, folder=tempfile.gettempdir()).stderr)}


def test_every_example_has_its_expected_output_here():
    assert sorted(EXAMPLES) == sorted(PRINTED)


def _main(path, folder, printed):
    """What a child does: it runs an example as a program, in a folder of its own."""
    for number, file in enumerate(printed, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    sys.argv = [str(path)]
    runpy.run_path(str(path), run_name="__main__")


def forked(path, folder, printed):
    """Runs an example where TensorFlow is imported already, which takes most of the time of a short one."""
    process = CONTEXT.Process(target=_main, args=(path, folder, printed))
    process.start()
    process.join(120)
    process.kill()
    process.join()
    return subprocess.CompletedProcess([], process.exitcode, *(file.read_text() for file in printed))


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example_prints_what_it_shows_and_nothing_to_stumble_over(name, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    if name == "quickstart":  # as its reader starts it
        done = run(EXAMPLES[name], folder=folder)
    else:
        done = forked(EXAMPLES[name], folder, [tmp_path / "stdout", tmp_path / "stderr"])
    assert done.returncode == 0, done.stderr

    rest = done.stdout
    for pattern, numbers in PRINTED[name]:
        found = re.search(pattern, rest, re.MULTILINE)
        assert found, f"{pattern} is not in what follows:\n{rest}"
        assert [float(group) for group in found.groups()] == pytest.approx(list(numbers), rel=1e-3)
        rest = rest[found.end() :]

    absl_header = "WARNING: All log messages before absl::InitializeLog()"
    warned = [line for line in without_prefix(done.stderr) if not line.startswith(("I ", absl_header))]
    assert [line for line in warned if line not in import_noise()] == []
    assert not list(folder.iterdir()), "an example leaves files behind"


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example_quietens_tensorflow_before_it_is_imported(name):
    text = EXAMPLES[name].read_text(encoding="utf-8")
    quiet = text.index('os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")')
    assert quiet < re.search("^import (?:keras|tensorflow|tapekit)", text, re.MULTILINE).start()
