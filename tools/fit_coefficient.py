"""Estimates the coefficient with which RewardAscent tilts as much as p* does, at the objective's noise levels.

  python tools/fit_coefficient.py --gin_file=gin/captions_reward_ascent.gin
  python tools/fit_coefficient.py --gin_file=gin/captions_reward_ascent.gin --gin_param='GUIDANCE = 4.0'

Noise hides part of the divergence beside the ascent, so that with c = E[w] the student is tilted beyond p*. q = p* is
at rest if E_t[w(t) E[log R_t(x_t) | x0]] = c log R(x0) + a constant of each condition (`algebra.objective`). The tool
draws x0 ~ p, from the run's data or, without data, exact samples of the teacher, noises each several times, takes R_t
to first order, R(mu(x_t)), and fits c by least squares, each caption or class with a constant of its own. The standard
error is the fit's (heteroscedastic, White 1980); the bias of the first order is not in it. Conditions under which log R
does not vary say nothing about c and are left out, so a caption is used only if several images have it.
"""

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
command_line.define_configuration()
command_line.define_device()
flags.DEFINE_integer("samples", 4000, "Samples x0 of p, those left out included.", lower_bound=3, upper_bound=10**8)
flags.DEFINE_integer("times", 20, "Noise levels of each sample.", lower_bound=1, upper_bound=10**6)
flags.DEFINE_integer("batch_size", 250, "Samples a pass of the teacher.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of data, times and noise.", lower_bound=0, upper_bound=2**63 - 1)


def main(arguments):
    command_line.needs_configuration(arguments, "gin/captions_reward_ascent.gin")
    from fits.coefficient import fit

    found = fit()
    print(f"# {found.samples:,} samples in {found.groups} conditions, {FLAGS.times} noise levels each; ", end="")
    print(f"E[w] = {found.weight:.4g}")
    print(f"# standard error {found.error:.2g}")
    print(f"RewardAscent.coefficient = {found.coefficient:.4g}")


if __name__ == "__main__":
    command_line.run(main)
