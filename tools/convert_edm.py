"""Converts an official EDM network to safetensors, and writes the gin lines that build it.

  python tools/convert_edm.py edm-cifar10-32x32-uncond-vp.pkl teachers/cifar10
  python tools/convert_edm.py --preconditioning=VPPreconditioned ddpmpp.pt teachers/ddpmpp

Official pickles (.pkl) hold Python source that their own loader runs; here nothing in the file is run, and a pickle
that holds anything but a network is refused. Plain state dicts (.pt, .pth) with official names are read too; they do
not say how the network was preconditioned, which --preconditioning does (EDM by default).

The folder gets weights.safetensors, network.json (class names and constructor arguments) and network.gin, which a
run includes:

  python launch/main.py --gin_file=gin/mine.gin --gin_file=teachers/cifar10/network.gin --workdir=runs/mine

The official files: https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-{un,}cond-{vp,ve}.pkl,
edm-ffhq-64x64-uncond-{vp,ve}.pkl, edm-afhqv2-64x64-uncond-{vp,ve}.pkl, edm-imagenet-64x64-cond-adm.pkl.
"""

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
DENOISERS = ("EDM", "VPPreconditioned", "VEPreconditioned")
flags.DEFINE_enum("preconditioning", None, DENOISERS, "Class of the denoiser, for plain state dicts.")


def main(arguments):
    command_line.exactly(arguments, 2, "give the official file and the folder to write: convert_edm.py FILE OUT_DIR")
    from ratiograph.networks.edm_weights import convert_file

    file, out = arguments
    description = convert_file(file, out, FLAGS.preconditioning)
    print(f"{out}: {description.denoiser} with {description.network}; include {out}/network.gin in a run")


if __name__ == "__main__":
    command_line.run(main)
