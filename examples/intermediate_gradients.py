"""Takes the gradients of y with respect to x and to the intermediate z, for z = x - 4 and y = z**2.

A plain `tf.GradientTape` gives one gradient and is used up. A persistent one gives any number, and keeps what it
has recorded until somebody deletes it. `PersistentTape` gives any number and lets go at the end of its block. In
the loop, `TapeStep(intermediates=True)` takes both in one backward pass. Where a gradient is None, `explain` says why.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import tensorflow as tf

import tapekit as tk


def with_a_plain_tape(x: tf.Variable) -> None:
    """Fails at the second gradient."""
    with tf.GradientTape() as tape:
        z = x - 4.0
        y = z**2
    try:
        dz = tape.gradient(y, z)
        dx = tape.gradient(y, x)
        print(f"dy/dz = {dz:.1f}, dy/dx = {dx:.1f}")
    except RuntimeError as error:
        print(f"RuntimeError: {error}")


def with_a_persistent_tape(x: tf.Variable) -> None:
    """Takes as many as are wanted, one by one or all together."""
    with tk.PersistentTape() as tape:
        z = tape.intermediate("z", x - 4.0)
        y = z**2
        dz, dx = tape.gradient(y, z), tape.gradient(y, x)
        everything = tape.gradients(y)
        second = tape.hessian(y, x)
    print(f"dy/dz = {dz:.1f}, dy/dx = {dx:.1f}, d2y/dx2 = {second:.1f}")
    print("all:", ", ".join(f"{name} {gradient:.1f}" for name, gradient in everything.items()))
    try:
        tape.gradient(y, x)
    except tk.TapeReleasedError as error:
        print(f"TapeReleasedError: {error}")


def in_the_loop(x: tf.Variable) -> None:
    """Records both gradients at every step."""
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(learning_rate=0.25),
        step=tk.TapeStep(intermediates=True),
        max_iterations=5,
        measures={
            "dy/dz": lambda intermediates: intermediates["z"],
            "dy/dx": lambda gradients: gradients[0],
        },
        callbacks=[tk.callbacks.IterationTable(["loss", "dy/dz", "dy/dx", "gradient_norm/z"])],
    )
    result = loop.minimize(lambda: tk.intermediate("z", x - 4.0) ** 2, [x])
    print(f"x = {result.variables[0]:.3f}")


@tf.function
def inside_a_function(x: tf.Variable) -> None:
    """Finds the cut in the graph of a function, when it is traced."""
    with tk.PersistentTape() as tape:
        y = tf.stop_gradient(x - 4.0) ** 2
        print("in a tf.function:", tape.explain(y, x))


def main() -> None:
    x = tf.Variable(1.0, name="x")
    print("A plain tape:")
    with_a_plain_tape(x)

    print("\nPersistentTape:")
    with_a_persistent_tape(x)

    print("\nTapeStep(intermediates=True):")
    in_the_loop(x)

    print("\nWhy a gradient is None:")
    with tk.PersistentTape() as tape:
        constant = tf.constant(1.0)
        y = (x - 4.0 * constant) ** 2
        print("gradient:", tape.gradient(y, constant))
        print("eagerly:", tape.explain(y, constant))
    inside_a_function(x)


if __name__ == "__main__":
    main()
