"""Estimates log Z of a run's reward-tilted targets once, from samples of p, and writes it as a gin file.

  python tools/fit_normalizer.py --gin_file=gin/mnist_reward_tilt.gin --samples=5000 --out=normalizer.gin
  python launch/main.py --gin_file=gin/mnist_reward_tilt.gin --gin_file=normalizer.gin

Z = E_p[R] is one number for all noise levels, and every weighting but KL's needs it, as omega(R_t/Z) depends on it.
Without the file a run estimates it anew from RewardTilted.normalizer_samples samples before its first step; with it,
none is read. The samples are the first of the run's data in its own shuffled order, none of them twice, or, for a run
without data, exact ones of the teacher. The file says what it is of, from how many samples, and the standard error of
log Z: at an error of 0.05 omega(r*) of the least-squares weighting is off by 5%. Few effective samples,
N / E[(R/Z)^2], mean that a few samples carry the estimate, and then its error is underestimated too.
"""

from pathlib import Path

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
command_line.define_configuration("data")
command_line.define_device()
flags.DEFINE_integer("samples", 5000, "Samples of p.", lower_bound=2, upper_bound=10**8)
flags.DEFINE_integer("batch_size", 500, "Samples a pass of the reward.", lower_bound=1)
flags.DEFINE_integer(
    "seed", 0, "Seed of the order of the data, or of the teacher's samples.", lower_bound=0, upper_bound=2**63 - 1
)
flags.DEFINE_string("out", "normalizer.gin", "The file to write.")


def main(arguments):
    command_line.needs_configuration(arguments, "gin/mnist_reward_tilt.gin")
    from fits.normalizer import fit
    from ratiograph.core.files import write_atomically

    text = fit()
    write_atomically(Path(FLAGS.out), text.encode())
    print(f"{text}\n{FLAGS.out}")


if __name__ == "__main__":
    command_line.run(main)
