"""What `bdl train cluster=inline` adds to a bare Lightning run: whole processes, from the shell to their end.

    python scripts/bench/bench_inline.py [REPEATS]

Both read the same table, train one network of the same shape by the same number of Adam steps, and score the test
rows. The bare one is a script that somebody would write: imports, a LightningModule, `Trainer.fit`. One epoch, so that
what is fixed shows: Lightning's cost of each step is another matter (bench_stack.py).
"""

import statistics
import subprocess
import sys
import tempfile
import time

EPOCHS = 1
BARE = f"""
import logging, warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl, torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
pl.seed_everything(0)
x, y = load_breast_cancer(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.1, random_state=0)
mean, std = x_train.mean(0), x_train.std(0)
tensors = [torch.tensor((part - mean) / std, dtype=torch.float32) for part in (x_train, x_test)]


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 2))

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


net = Net()
loader = DataLoader(TensorDataset(tensors[0], torch.tensor(y_train)), batch_size=32, shuffle=True)
trainer = pl.Trainer(max_epochs={EPOCHS}, accelerator="cpu", logger=False, enable_progress_bar=False,
                     enable_model_summary=False)
trainer.fit(net, loader)
trainer.save_checkpoint("end.ckpt")
with torch.no_grad():
    print("nll", float(nn.functional.cross_entropy(net.net(tensors[1]), torch.tensor(y_test))))
"""
INLINE = ("-m", "bdl_train", "train", "cluster=inline", "num_members=1", "inference=deep_ensemble")
INLINE += ("inference.patience=null", f"trainer.max_epochs={EPOCHS}")


def seconds(*words: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True)
        return time.perf_counter() - start


def main(repeats: int) -> None:
    ways = {"bare Lightning": ("-c", BARE), "bdl train cluster=inline": INLINE}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):  # interleaved; the first round fills the caches of files
        for name, words in ways.items():
            spent[name].append(seconds(*words))
    bare, inline = (statistics.median(times[1:]) for times in spent.values())
    for name, times in spent.items():
        print(
            f"{name}: {statistics.median(times[1:]):.2f} s  ({', '.join(f'{one:.2f}' for one in times[1:])})"
        )
    print(f"added: {inline - bare:.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
