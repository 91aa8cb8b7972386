"""nvidia-smi's answers as real machines give them, by `--query-gpu` with csv,noheader,nounits.

CAPTURES: utkuozdemir/nvidia_gpu_exporter, internal/captures (identifiers masked there): the columns of our
query, without units. Where only a table was published, its values stand in the form of our query.
"""

from training.hardware.nvidia import Reply

RTX_2060 = Reply(code=0, text="""\
0, GPU-8a2d7a31-5b0c-9f0e-3f4b-6a7b1d1c2e3f, NVIDIA GeForce RTX 2060 SUPER, 7.5, 8192, 7586, 550.90.07, [N/A]
""")
TWO_GPUS = Reply(code=0, text="""\
0, GPU-11111111-5b0c-9f0e-3f4b-6a7b1d1c2e3f, NVIDIA GeForce RTX 3090, 8.6, 24576, 23987, 570.124.06, [N/A]
1, GPU-22222222-5b0c-9f0e-3f4b-6a7b1d1c2e3f, NVIDIA GeForce RTX 4090, 8.9, 24564, 24000, 570.124.06, [N/A]
""")
# CAPTURES, linux-x86_64__nvidia-geforce-rtx-2080-super__610.57.04
RTX_2080_SUPER = Reply(code=0, text="""\
0, GPU-00000000-0000-0000-0000-000000000000, NVIDIA GeForce RTX 2080 SUPER, 7.5, 8192, 7582, 610.57.04, [N/A]
""")
# CAPTURES, windows-x86_64__nvidia-geforce-rtx-2080-super__591.86 (driver model WDDM)
RTX_2080_SUPER_WDDM = Reply(code=0, text="""\
0, GPU-00000000-0000-0000-0000-000000000000, NVIDIA GeForce RTX 2080 SUPER, 7.5, 8192, 7286, 591.86, [N/A]
""")
# noonghunna/club-3090#102: WSL2, kernel 6.6.87.2-microsoft-standard-WSL2. Name, total and driver as told
# there; what was free is not, and made up here.
RTX_5090_LAPTOP_WSL = Reply(code=0, text="""\
0, GPU-00000000-0000, NVIDIA GeForce RTX 5090 Laptop GPU, 12.0, 24463, 23000, 596.36, [N/A]
""")
# RLinf/RLinf#255: its table shows 507 and 459 MiB used of 24,564.
TWO_RTX_4090 = Reply(code=0, text="""\
0, GPU-00000000-0000-0000-0000-000000000000, NVIDIA GeForce RTX 4090, 8.9, 24564, 24057, 550.163.01, [N/A]
1, GPU-00000001-0000-0000-0000-000000000001, NVIDIA GeForce RTX 4090, 8.9, 24564, 24105, 550.163.01, [N/A]
""")
# CAPTURES, linux-x86_64__nvidia-l40s__595.80
L40S = Reply(code=0, text="""\
0, GPU-00000000-0000-0000-0000-000000000000, NVIDIA L40S, 8.9, 46068, 45460, 595.80, [N/A]
""")
# CAPTURES, linux-x86_64__nvidia-h200__590.48.01
H200 = Reply(code=0, text="""\
0, GPU-00000000-0000-0000-0000-000000000000, NVIDIA H200, 9.0, 143771, 143158, 590.48.01, Disabled
""")
# CAPTURES, linux-x86_64__nvidia-h200-mig__590.48.01
H200_MIG = Reply(code=0, text="""\
0, GPU-00000000-0000-0000-0000-000000000000, NVIDIA H200, 9.0, 143771, 143103, 590.48.01, Enabled
""")
H200_MIG_LIST = Reply(code=0, text="""\
GPU 0: NVIDIA H200 (UUID: GPU-00000000-0000-0000-0000-000000000000)
  MIG 1c.3g.71gb  Device  0: (UUID: MIG-00000000-0000-0000-0000-000000000000)
  MIG 2c.3g.71gb  Device  1: (UUID: MIG-00000001-0000-0000-0000-000000000001)
  MIG 2g.35gb     Device  2: (UUID: MIG-00000002-0000-0000-0000-000000000002)
  MIG 1g.18gb     Device  3: (UUID: MIG-00000003-0000-0000-0000-000000000003)
  MIG 1g.18gb     Device  4: (UUID: MIG-00000004-0000-0000-0000-000000000004)
""")
H200_MIG_TABLE = Reply(code=0, text="""\
| MIG devices:                                                                            |
+------------------+----------------------------------+-----------+-----------------------+
| GPU  GI  CI  MIG |              Shared Memory-Usage |        Vol|        Shared         |
|      ID  ID  Dev |                Shared BAR1-Usage | SM     Unc| CE ENC  DEC  OFA  JPG |
|==================+==================================+===========+=======================|
|  0    2   0   0  |              22MiB / 71424MiB    | 16      0 |  3   0    3    0    3 |
|                  |               0MiB / 59237MiB    |           |                       |
+------------------+----------------------------------+-----------+-----------------------+
|  0    2   1   1  |              22MiB / 71424MiB    | 32      0 |  3   0    3    0    3 |
|                  |               0MiB / 59237MiB    |           |                       |
+------------------+----------------------------------+-----------+-----------------------+
|  0    3   0   2  |              17MiB / 33280MiB    | 32      0 |  2   0    2    0    2 |
|                  |               0MiB / 29618MiB    |           |                       |
+------------------+----------------------------------+-----------+-----------------------+
|  0    9   0   3  |               9MiB / 16384MiB    | 16      0 |  1   0    1    0    1 |
|                  |               0MiB / 14809MiB    |           |                       |
+------------------+----------------------------------+-----------+-----------------------+
""")
# CAPTURES, linux-x86_64__nvidia-h100-mig__590.48.01
H100_MIG = Reply(code=0, text="""\
0, GPU-00000000-0000-0000-0000-000000000000, NVIDIA H100 80GB HBM3, 9.0, 81559, 81022, 590.48.01, Enabled
""")
H100_MIG_LIST = Reply(code=0, text="""\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-0000-0000-0000-000000000000)
  MIG 3g.40gb     Device  0: (UUID: MIG-00000000-0000-0000-0000-000000000000)
  MIG 2g.20gb     Device  1: (UUID: MIG-00000001-0000-0000-0000-000000000001)
  MIG 1g.10gb     Device  2: (UUID: MIG-00000002-0000-0000-0000-000000000002)
  MIG 1g.10gb     Device  3: (UUID: MIG-00000003-0000-0000-0000-000000000003)
""")
H100_MIG_TABLE = Reply(code=0, text="""\
|  0    2   0   0  |              26MiB / 40448MiB    | 60      0 |  3   0    3    0    3 |
|                  |               0MiB / 24739MiB    |           |                       |
""")
# influxdata/telegraf#5812: one of four A100 is divided; the listing is as pasted, the query made to match it.
MIXED_QUERY = Reply(code=0, text="".join(
    f"{index}, GPU-0000000{index}, NVIDIA A100-SXM4-80GB, 8.0, 81920, 81251, 535.129.03, {mode}\n"
    for index, mode in enumerate(("Enabled", "Disabled", "Disabled", "Disabled"))))
MIXED_LIST = Reply(code=0, text="""\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-513536b6-7d19-9063-b049-1e69664bb298)
  MIG 1g.20gb     Device  0: (UUID: MIG-ce861fb0-a248-58ce-a9a8-f9adbc22a66a)
  MIG 1g.20gb     Device  1: (UUID: MIG-a45882f0-9215-5733-a0c1-49286ab31cb5)
  MIG 1g.20gb     Device  2: (UUID: MIG-f00d722c-f4e1-52c9-aa31-750441ae1bfe)
  MIG 1g.20gb     Device  3: (UUID: MIG-930574a9-d43a-5d2b-95da-3e68384c8d6b)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-d8594bd4-0fc3-8595-e355-7c98138f3b95)
GPU 2: NVIDIA A100-SXM4-80GB (UUID: GPU-5e375e7e-b41f-155b-dcdc-534524c356fc)
GPU 3: NVIDIA A100-SXM4-80GB (UUID: GPU-69ec2344-ebac-b028-f88f-452abb3d7f11)
""")
NO_TABLE = Reply(code=0, text="")
MIG_QUERY = Reply(code=0, text="""\
0, GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77, NVIDIA A100-SXM4-40GB, 8.0, 40960, 40333, 535.129.03, Enabled
""")
MIG_LIST = Reply(code=0, text="""\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
""")
MIG_EMPTY_LIST = Reply(code=0, text="GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d)\n")
# mozilla/translations#1167, with its return code
MISMATCH = Reply(code=18, text="Failed to initialize NVML: Driver/library version mismatch\n"
                               "NVML library version: 550.144\n")
NOT_LOADED = Reply(code=9, text="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA "
                                "driver. Make sure that the latest NVIDIA driver is installed and "
                                "running.\n\n")
# NVIDIA/open-gpu-kernel-modules#862: an RTX 5090 that the loaded driver 570.153.02 does not open
NO_DEVICES = Reply(code=6, text="No devices were found\n")
LOST = Reply(code=15, text="Unable to determine the device handle for GPU0000:01:00.0: GPU is lost.  "
                           "Reboot the system to recover this GPU\n")
NOT_FOUND = Reply(code=None, text="nvidia-smi: command not found")
HUNG = Reply(code=None, text="nvidia-smi did not answer within 10 s")
# huggingface/candle#733, driver 470.182.03
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
