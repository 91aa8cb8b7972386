"""nvidia-smi's answers as real machines give them, by `--query-gpu` with csv,noheader,nounits."""

from training.hardware.nvidia import Reply

RTX_2060 = Reply(code=0, text="""\
0, GPU-8a2d7a31-5b0c-9f0e-3f4b-6a7b1d1c2e3f, NVIDIA GeForce RTX 2060 SUPER, 7.5, 8192, 7586, 550.90.07, [N/A]
""")
TWO_GPUS = Reply(code=0, text="""\
0, GPU-11111111-5b0c-9f0e-3f4b-6a7b1d1c2e3f, NVIDIA GeForce RTX 3090, 8.6, 24576, 23987, 570.124.06, [N/A]
1, GPU-22222222-5b0c-9f0e-3f4b-6a7b1d1c2e3f, NVIDIA GeForce RTX 4090, 8.9, 24564, 24000, 570.124.06, [N/A]
""")
MIG_QUERY = Reply(code=0, text="""\
0, GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77, NVIDIA A100-SXM4-40GB, 8.0, 40960, 40333, 535.129.03, Enabled
""")
MIG_LIST = Reply(code=0, text="""\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
""")
MIG_EMPTY_LIST = Reply(code=0, text="GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d)\n")
MISMATCH = Reply(code=18, text="Failed to initialize NVML: Driver/library version mismatch\n"
                               "NVML library version: 535.161\n")
NOT_LOADED = Reply(code=9, text="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA "
                                "driver. Make sure that the latest NVIDIA driver is installed and "
                                "running.\n\n")
NO_DEVICES = Reply(code=6, text="No devices were found\n")
LOST = Reply(code=15, text="Unable to determine the device handle for GPU0000:01:00.0: GPU is lost.  "
                           "Reboot the system to recover this GPU\n")
NOT_FOUND = Reply(code=None, text="nvidia-smi: command not found")
HUNG = Reply(code=None, text="nvidia-smi did not answer within 10 s")
OLD_REFUSAL = Reply(code=2, text='Field "compute_cap" is not a valid field to query.\n\n')
OLD_ANSWER = Reply(code=0, text="0, GPU-33333333-5b0c-9f0e-3f4b, Tesla T4, 15109, 14700, 450.80.02\n")
SHARED_MEMORY = Reply(code=0, text="""\
0, GPU-44444444-5b0c-9f0e, NVIDIA GB10, 12.1, [N/A], [N/A], 580.95.05, [N/A]
""")


def answers(*replies):
    """A stand-in for `run_smi` that gives these replies in turn and keeps what it was asked."""
    queue, asked = list(replies), []

    def ask(arguments):
        asked.append(arguments)
        return queue.pop(0)

    ask.asked = asked
    return ask
