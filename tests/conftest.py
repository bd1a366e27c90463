"""What holds for every test: one thread, as in the measurements that tests are compared with."""

import torch

torch.set_num_threads(1)
