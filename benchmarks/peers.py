"""Check on the installed releases what nbs/explains says about other libraries, and write benchmarks/peers.json.

    pip install -e '.[bench]'               # fasterai, which brings Torch-Pruning
    pip install lightning                   # optional, in an environment that may have it
    python benchmarks/peers.py              # everything installed, under a minute
    python benchmarks/peers.py fasterai     # one library

A library that is not installed is not checked: its committed values stay, with the version and the date they are of.
Each library is a class and each of its public functions a fact: it runs something small and returns a plain value, which goes
to the json under the function's name. Facts about open_lth, which is no package, were read in its source: `READ` names the file.
"""
import contextlib
import copy
import importlib
import inspect
import io
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

FILE = Path(__file__).with_suffix('.json')
POINT, N_EPOCH, START, N_BATCHES = 1, 13, 4, 8  # rewind to epoch 1; four dense epochs, then three rounds from epoch 1 to 4


def net():
    "A network with batch norm, the same each time."
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 2))


PLAIN = set(net().state_dict())


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.TensorDataset(torch.randn(8*N_BATCHES, 10, generator=generator), torch.randint(2, (8*N_BATCHES,), generator=generator))


def one_layer(weights):
    "A layer with these hundred weights."
    layer = nn.Linear(100, 1, bias=False)
    layer.weight.data = weights.clone().float().view(1, -1)
    return nn.Sequential(layer)


EQUAL, DISTINCT = torch.ones(100), torch.arange(1, 101)


def cut(t): return int((t == 0).sum())


def zeroed(model, run):
    "Names of the parameters that `run` cuts something of, in a model without zeros."
    for p in model.parameters(): nn.init.normal_(p)
    run(model)
    return sorted(n for n, t in values(model).items() if cut(t))


def values(model):
    "Name -> the value that is used in the forward pass, for every parameter, masked or not."
    masks = {n.removesuffix('_mask'): b for n, b in model.named_buffers() if n.endswith('_mask')}
    return {(n := name.removesuffix('_orig')): p.detach()*masks[n] if name.endswith('_orig') else p.detach() for name, p in model.named_parameters()}


def conv_net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 2))


@contextlib.contextmanager
def quiet():
    "No progress, no prints, no warnings; files go to a folder that goes away."
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        os.chdir(folder)
        try: yield
        finally: os.chdir(here)


class Rows(list):
    "The state before each training batch's forward pass."
    def add(self, model, momentum, lr, batch):
        bn = next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d))
        self.append(dict(values={n: t.clone() for n, t in values(model).items()}, running=bn.running_mean.clone(), momentum=momentum, lr=lr, batch=float(batch.sum())))

    def n_cut(self, i): return sum(cut(t) for n, t in self[i]['values'].items() if 'weight' in n and t.ndim == 2)
    def prunings(self): return [i for i in range(1, len(self)) if self.n_cut(i) > self.n_cut(i - 1)]

    def same(self, i, j, names=('0.weight', '3.weight')):
        "Are the weights before batch i those before batch j, where they are not cut?"
        a, b = self[i]['values'], self[j]['values']
        names = [n for n in a if n.endswith(names)]
        return all(torch.equal(a[n], b[n]*(a[n] != 0)) for n in names)

    def rewound(self, pruning, point):
        "The first batch from the pruning on that starts at the weights of the point; None if there is none."
        later = [p for p in self.prunings() if p > pruning] + [len(self)]
        return next((i for i in range(pruning, later[0]) if self.same(i, point)), None)

    def which(self, i, key, point, reset):
        "Where is a part of batch norm after the rewind?"
        now, then = (self[j]['values'][key] if key in self[j]['values'] else self[j][key] for j in (i, point))
        if torch.equal(now, then): return 'rewind point'
        return 'reset' if torch.equal(now, torch.full_like(now, reset)) else 'left'


class InFastai:
    "Facts about a callback in a fastai fit."
    point = POINT*N_BATCHES

    def _learner(self):
        import fastai.callback.schedule
        from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
        dls = DataLoaders.from_dsets(data(), data(), bs=8, num_workers=0)
        return Learner(dls, net(), loss_func=CrossEntropyLossFlat(), lr=.01)

    def _watch(self, stop_at=None):
        from fastai.callback.core import Callback
        class Watch(Callback):
            order, rows, plain = 99, Rows(), []
            def before_batch(self):
                if not self.training: return
                if len(self.rows) == stop_at: raise KeyboardInterrupt
                state = [v for s in self.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
                self.rows.add(self.learn.model, any(v.any() for v in state), float(self.opt.hypers[-1]['lr']), self.xb[0])
                self.plain.append(set(self.learn.model.state_dict()) == PLAIN)
        return Watch()

    def _fit(self, callback=None, learn=None, one_cycle=False, n_epoch=N_EPOCH, stop_at=None):
        "Fit, and give the learner, what was watched, and the callback."
        learn, callback, watch = learn or self._learner(), callback or self._callback(), self._watch(stop_at)
        with quiet(), learn.no_bar(), learn.no_logging(), contextlib.suppress(KeyboardInterrupt):
            (learn.fit_one_cycle if one_cycle else learn.fit)(n_epoch, .01, cbs=[callback, watch])
        return learn, watch, callback

    def _after_rewind(self, **kwargs):
        "The rows, and the batch after the first rewind."
        rows = self._fit(**kwargs)[1].rows
        return rows, rows.rewound(rows.prunings()[0], self.point)

    def steps_pruned_not_rewound(self):
        rows, i = self._after_rewind()
        return i - rows.prunings()[0]

    def optimizer_state_survives(self):
        rows, i = self._after_rewind()
        return bool(rows[i]['momentum'])

    def batch_norm_statistics(self):
        rows, i = self._after_rewind()
        return rows.which(i, 'running', self.point, 0)

    def batch_norm_weight(self):
        rows, i = self._after_rewind()
        return rows.which(i, '1.weight', self.point, 1)

    def learning_rate_goes_back(self):
        rows, i = self._after_rewind(one_cycle=True)
        return abs(rows[i]['lr'] - rows[self.point]['lr']) < 1e-9

    def batches_come_again(self):
        rows, i = self._after_rewind()
        return [r['batch'] for r in rows[i:i + 8]] == [r['batch'] for r in rows[self.point:self.point + 8]]

    def every_rewind_to_same_weights(self):
        rows = self._fit()[1].rows
        return all(rows.rewound(p, self.point) is not None for p in rows.prunings())

    def rewind_inside_epoch(self):
        rows, asked = self._fit(self._callback(rewind_epoch=1.5))[1].rows, 3*N_BATCHES//2
        if rows.rewound(rows.prunings()[0], asked) is not None: return 'yes'
        return 'no: goes to initialisation without a word' if rows.rewound(rows.prunings()[0], 0) is not None else 'no'

    def state_dict_plain_in_fit(self): return all(self._fit()[1].plain)

    def state_dict_plain_after_fit(self): return set(self._fit()[0].model.state_dict()) == PLAIN

    def least_sparsity_in_next_fit(self):
        "In percent, when the same callback is given to another fit; the first ended at 75."
        learn, _, callback = self._fit()
        rows = self._fit(callback, learn)[1].rows
        return round(100*min(rows.n_cut(i) for i in range(1, len(rows)))/240)

    def cut_at_end_of_next_fit_without_callback(self):
        "In percent, after one epoch without the callback."
        learn = self._fit()[0]
        with quiet(), learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
        return round(100*sum(cut(m.weight) for m in learn.model if isinstance(m, nn.Linear))/240)

    def two_fits_prune_alike(self):
        runs = [self._fit(self._callback(schedule=self._shared_schedule()))[1].rows for _ in range(2)]
        return self._levels(runs[0]) == self._levels(runs[1])

    def fit_after_interrupted_one_prunes_alike(self):
        first = self._fit(self._callback(schedule=self._shared_schedule()))[1].rows
        self._fit(self._callback(schedule=self._shared_schedule()), stop_at=65)
        return self._levels(first) == self._levels(self._fit(self._callback(schedule=self._shared_schedule()))[1].rows)

    def fit_after_interrupted_one_has_same_weights(self):
        "Batch by batch, where everything is seeded."
        def rows():
            torch.manual_seed(2)
            from fastai.torch_core import set_seed
            learn = self._learner()
            set_seed(3)
            learn.dls.rng.seed(3)
            return self._fit(self._callback(schedule=self._shared_schedule()), learn)[1].rows
        first, again = rows(), rows()
        self._fit(self._callback(schedule=self._shared_schedule()), stop_at=65)
        last = rows()
        def first_other(a, b): return next((i for i, (x, y) in enumerate(zip(a, b)) if any(not torch.equal(x['values'][n], y['values'][n]) for n in x['values'])), None)
        if first_other(first, again) is not None: return 'cannot be seeded'
        return True if (i := first_other(first, last)) is None else f'no: they differ from step {i + 1} on'

    @staticmethod
    def _levels(rows): return [(i, rows.n_cut(i)) for i in rows.prunings()]


class Fasterai(InFastai):
    distribution = 'fasterai'

    def _shared_schedule(self): return importlib.import_module('fasterai.core.schedule').iterative

    def _callback(self, sparsity=.75, schedule=None, rewind_epoch=POINT, **kwargs):
        from fasterai.core.criteria import large_final
        from fasterai.core.schedule import Schedule, sched_iterative
        from fasterai.sparse.sparsify_callback import SparsifyCallback
        return SparsifyCallback(sparsity, 'weight', 'global', large_final, schedule or Schedule(sched_iterative, start_pct=START/N_EPOCH),
                                lth=True, rewind_epoch=rewind_epoch, layer_type=nn.Linear, **kwargs)

    def _prune(self, model, **kwargs):
        from fasterai.core.criteria import large_final
        from fasterai.sparse.sparsifier import Sparsifier
        Sparsifier(model, 'weight', 'global', large_final, **kwargs).sparsify_model(.5)
        return model

    def cut_of_100_equal(self): return cut(self._prune(one_layer(EQUAL), layer_type=nn.Linear)[0].weight)
    def cut_of_100_distinct(self): return cut(self._prune(one_layer(DISTINCT), layer_type=nn.Linear)[0].weight)
    def cut_by_default(self): return zeroed(conv_net(), self._prune)

    def arguments(self):
        from fasterai.sparse.sparsify_callback import SparsifyCallback
        required = inspect.Parameter.empty
        return {n: 'required' if p.default is required else getattr(p.default, '__name__', p.default) for n, p in inspect.signature(SparsifyCallback).parameters.items()}

    def percent_accepted(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            sparsity = self._callback(50).sparsity
        return f'read as {sparsity}, with a {caught[0].category.__name__}' if caught else f'read as {sparsity}'

    def tickets(self):
        "File -> percent of its weights that are cut, and whether it loads without executing a pickle."
        here, learn, found = os.getcwd(), self._learner(), {}
        with quiet(), learn.no_bar(), learn.no_logging():
            learn.fit(N_EPOCH, .01, cbs=self._callback(save_tickets=True))
            for file in sorted(Path('.').glob('*.pth')):
                model = torch.load(file, weights_only=False)
                found[file.name] = round(100*sum(cut(m.weight) for m in model if isinstance(m, nn.Linear))/240)
        return found

    def ticket_loads_weights_only(self):
        learn = self._learner()
        with quiet(), learn.no_bar(), learn.no_logging():
            learn.fit(N_EPOCH, .01, cbs=self._callback(save_tickets=True))
            try: torch.load(next(Path('.').glob('*.pth')), weights_only=True)
            except Exception: return False
        return True

    def state_dict_plain_after_updating_movement(self):
        from fasterai.core.criteria import updating_movement
        callback = self._callback()
        callback.criteria = updating_movement
        return set(self._fit(callback)[0].model.state_dict()) == PLAIN

    def millions_of_weights_after_half_the_filters(self):
        from fasterai.core.criteria import large_final
        from fasterai.core.schedule import one_shot
        from fasterai.prune.pruner import Pruner
        def halve(model): Pruner(model, .5, 'local', large_final, schedule=one_shot, example_inputs=torch.randn(1, 3, 64, 64)).prune_model()
        return resnet_after(halve)

    def names(self):
        from fasterai.core.criteria import criterias
        from fasterai.core.granularity import Granularities
        from fasterai.core.schedule import available_schedules
        return dict(criteria=sorted(criterias), schedules=sorted(available_schedules()), granularities=sorted(Granularities._granularities_Conv2d))

    def cut_after_distilling_with_mask_held_by_lth_nb(self):
        "In percent, after a fit with fasterai's distillation and lth_nb's `MaskCallback`; the ticket had 75."
        from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
        from fasterai.distill.losses import SoftTarget
        from lth_nb.callback import MaskCallback
        learn, _, callback = LthNb()._fit()
        with quiet(), learn.no_bar(), learn.no_logging():
            learn.fit(1, .01, cbs=[KnowledgeDistillationCallback(net(), SoftTarget), MaskCallback(callback.sparsifier)])
        return round(100*sum(cut(m.weight) for m in learn.model if isinstance(m, nn.Linear))/240)


class LthNb(InFastai):
    distribution = 'lth_nb'

    def _shared_schedule(self): return importlib.import_module('lth_nb.schedule').iterative

    def _callback(self, sparsity=75, schedule=None, rewind_epoch=POINT, **kwargs):
        from lth_nb.callback import SparsifyCallback
        return SparsifyCallback(sparsity, schedule=schedule or self._shared_schedule(), start_epoch=START, lth=True, rewind_epoch=rewind_epoch, **kwargs)

    def _prune(self, model):
        from lth_nb.sparsifier import Sparsifier
        Sparsifier(model).prune(50)
        return model

    def cut_of_100_equal(self): return cut(self._prune(one_layer(EQUAL))[0].weight)
    def cut_of_100_distinct(self): return cut(self._prune(one_layer(DISTINCT))[0].weight)
    def cut_by_default(self): return zeroed(conv_net(), self._prune)

    def ticket_loads_weights_only(self):
        "Safetensors: there is no pickle in it."
        from lth_nb.ticket import Ticket
        callback = self._fit()[2]
        with quiet(): return open(Ticket.from_callback(callback).save('t.safetensors'), 'rb').read()[8:9] == b'{'

    def millions_of_weights_after_half_the_filters(self):
        from lth_nb.sparsifier import Sparsifier
        return resnet_after(lambda model: Sparsifier(model, 'filter', 'local', ignore=['fc'], batch=torch.randn(1, 3, 64, 64)).prune(50))


def resnet_after(run):
    "Millions of weights stored in a ResNet-18 before and after."
    from torchvision.models import resnet18
    model = resnet18(num_classes=10)
    def stored(): return round(sum(p.numel() for p in model.parameters())/1e6, 2)
    before = stored()
    with quiet(): run(model)
    model.eval()(torch.randn(1, 3, 64, 64))
    return [before, stored()]


class TorchPrune:
    distribution = 'torch'

    def _prune(self, model):
        prune.global_unstructured([(m, 'weight') for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))], prune.L1Unstructured, amount=.5)
        return model

    def cut_of_100_equal(self): return cut(self._prune(one_layer(EQUAL))[0].weight)
    def cut_of_100_distinct(self): return cut(self._prune(one_layer(DISTINCT))[0].weight)

    def _trained(self, remove):
        "Ten steps with momentum and weight decay, prune, ten more; percent cut at the end, and whether the values under the mask moved."
        model = net()
        optimizer, (x, y) = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=.01), data().tensors
        def steps():
            for _ in range(10):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        steps()
        self._prune(model)
        before = model[0].weight_orig.detach().clone()
        if remove: prune.remove(model[0], 'weight'), prune.remove(model[3], 'weight')
        steps()
        moved = None if remove else not torch.equal(model[0].weight_orig[model[0].weight_mask == 0], before[model[0].weight_mask == 0])
        return round(100*(cut(model[0].weight) + cut(model[3].weight))/240), moved

    def cut_after_more_training(self): return self._trained(False)[0]
    def cut_after_more_training_when_made_permanent(self): return self._trained(True)[0]
    def values_under_mask_move(self): return self._trained(False)[1]
    def state_dict_plain_in_fit(self): return set(self._prune(net()).state_dict()) == PLAIN

    def state_dict_plain_after_fit(self):
        "After `prune.remove`."
        model = self._prune(net())
        for i in (0, 3): prune.remove(model[i], 'weight')
        return set(model.state_dict()) == PLAIN

    def deepcopy_works(self):
        model = self._prune(net())
        model(data().tensors[0])
        try: copy.deepcopy(model)
        except RuntimeError: return False
        return True

    def millions_of_weights_after_half_the_filters(self):
        def halve(model):
            for m in model.modules():
                if isinstance(m, nn.Conv2d): prune.ln_structured(m, 'weight', .5, n=2, dim=0), prune.remove(m, 'weight')
        return resnet_after(halve)


class Lightning:
    distribution = 'lightning'

    def _module(self):
        from lightning.pytorch import LightningModule
        class Module(LightningModule):
            def __init__(self):
                super().__init__()
                self.net = net()
            def forward(self, x): return self.net(x)
            def training_step(self, batch, i): return nn.functional.cross_entropy(self(batch[0]), batch[1])
            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), lr=.1, momentum=.9)
                return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, .9)]
        return Module()

    def _pruning(self, module=None, **kwargs):
        "Prune the two linear layers after epochs 1 and 3, or what is asked for."
        from lightning.pytorch.callbacks import ModelPruning
        if module: kwargs = dict(parameters_to_prune=[(module.net[0], 'weight'), (module.net[3], 'weight')]) | kwargs
        return ModelPruning('l1_unstructured', **(dict(amount=.5, apply_pruning=lambda epoch: epoch in (1, 3)) | kwargs))

    def _fit(self, module, callbacks, n_epoch=6, ckpt_path=None):
        "Fit; give the states before each batch, and the trainer."
        from lightning.pytorch import Callback, Trainer
        class Watch(Callback):
            rows, plain = Rows(), []
            def on_train_batch_start(self, trainer, pl_module, batch, i):
                state = [v for s in trainer.optimizers[0].state.values() for v in s.values() if isinstance(v, torch.Tensor)]
                self.rows.add(pl_module.net, any(v.any() for v in state), trainer.optimizers[0].param_groups[0]['lr'], batch[0])
                self.plain.append(set(pl_module.net.state_dict()) == PLAIN)
        watch = Watch()
        with quiet():
            trainer = Trainer(max_epochs=n_epoch, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, watch])
            trainer.fit(module, torch.utils.data.DataLoader(data(), 8, shuffle=True), ckpt_path=ckpt_path)
        return watch.rows, watch.plain, trainer

    def _after_rewind(self):
        module = self._module()
        rows = self._fit(module, [self._pruning(module)])[0]
        return rows, rows.prunings()

    def _prune(self, model):
        self._pruning(parameters_to_prune=[(model[0], 'weight')]).apply_pruning(.5)
        return model

    def cut_of_100_equal(self): return cut(self._prune(one_layer(EQUAL))[0].weight)
    def cut_of_100_distinct(self): return cut(self._prune(one_layer(DISTINCT))[0].weight)

    def cut_by_default(self):
        from lightning.pytorch.callbacks import ModelPruning
        def run(model): prune.global_unstructured(ModelPruning.sanitize_parameters_to_prune(model), prune.L1Unstructured, amount=.5)
        return zeroed(conv_net(), run)

    def sparsity_after_three_epochs_of_amount_half(self):
        "With apply_pruning at its default."
        module = self._module()
        self._fit(module, [self._pruning(module, apply_pruning=True)], n_epoch=3)
        return round(100*(cut(module.net[0].weight) + cut(module.net[3].weight))/240, 1)

    def ends_untrained_by_default(self):
        "Does the fit end with the kept weights at their initial values, since the last epoch prunes and rewinds too?"
        module, first = self._module(), net()[0].weight.detach()
        self._fit(module, [self._pruning(module, apply_pruning=True)], n_epoch=1)
        now = module.net[0].weight.detach()
        return torch.equal(now, first*(now != 0))

    def steps_pruned_not_rewound(self):
        rows, at = self._after_rewind()
        return rows.rewound(at[0], 0) - at[0]

    def every_rewind_to_same_weights(self):
        rows, at = self._after_rewind()
        return all(rows.rewound(p, 0) is not None for p in at)

    def second_rewind_moves_weights(self):
        "Are the kept weights after the second pruning other ones than before it, right after the last step of the round?"
        from lightning.pytorch import Callback
        module, trained = self._module(), []
        class Before(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if trainer.current_epoch == 3: trained.append(values(pl_module.net)['0.weight'].clone())
        rows = self._fit(module, [Before(), self._pruning(module)])[0]
        after = rows[rows.prunings()[1]]['values']['0.weight']
        return not torch.equal(after, trained[0]*(after != 0))

    def original_shares_memory_after_rewind(self):
        "Is the callback's copy of the initial weights, after the first rewind, the very memory that trains on?"
        module = self._module()
        callback = self._pruning(module, make_pruning_permanent=False)
        self._fit(module, [callback], n_epoch=2)
        return callback._original_layers[id(module.net[0])]['data'].weight.data_ptr() == module.net[0].weight_orig.data_ptr()

    def rewind_inside_epoch(self):
        "There is no argument for a rewind point."
        from lightning.pytorch.callbacks import ModelPruning
        return 'not known' if any('rewind' in n for n in inspect.signature(ModelPruning).parameters) else 'no: only to the start'

    def learning_rate_goes_back(self):
        rows, at = self._after_rewind()
        return abs(rows[at[0]]['lr'] - rows[0]['lr']) < 1e-9

    def optimizer_state_survives(self):
        rows, at = self._after_rewind()
        return bool(rows[at[0]]['momentum'])

    def batch_norm_statistics(self):
        rows, at = self._after_rewind()
        return rows.which(at[0], 'running', 0, 0)

    def batch_norm_weight(self):
        rows, at = self._after_rewind()
        return rows.which(at[0], '1.weight', 0, 1)

    def biases_go_back(self):
        rows, at = self._after_rewind()
        return torch.equal(rows[at[0]]['values']['0.bias'], rows[0]['values']['0.bias'])

    def batches_come_again(self):
        rows, at = self._after_rewind()
        return [r['batch'] for r in rows[at[0]:at[0] + 8]] == [r['batch'] for r in rows[:8]]

    def state_dict_plain_in_fit(self):
        module = self._module()
        return all(self._fit(module, [self._pruning(module)])[1])

    def state_dict_plain_after_fit(self):
        module = self._module()
        self._fit(module, [self._pruning(module)])
        return set(module.net.state_dict()) == PLAIN

    def _next_fit(self, **kwargs):
        module = self._module()
        self._fit(module, [self._pruning(module, **kwargs)])
        self._fit(module, [], n_epoch=1)
        return round(100*(cut(module.net[0].weight) + cut(module.net[3].weight))/240)

    def cut_at_end_of_next_fit_without_callback(self): return self._next_fit()
    def cut_at_end_of_next_fit_not_made_permanent(self): return self._next_fit(make_pruning_permanent=False)

    def _resumed(self, **kwargs):
        "Save after four epochs, at 75 %, resume with the same callback to six; what is cut then, in percent, and whether it came to it."
        with tempfile.TemporaryDirectory() as folder:
            module = self._module()
            file = f'{folder}/c.ckpt'
            from lightning.pytorch import Callback
            class Save(Callback):
                def on_train_epoch_start(self, trainer, pl_module):
                    if trainer.current_epoch == 4: trainer.save_checkpoint(file)
            self._fit(module, [self._pruning(module, **kwargs), Save()], n_epoch=5)
            again = self._module()
            try: self._fit(again, [self._pruning(again, **kwargs)], n_epoch=6, ckpt_path=file)
            except RuntimeError as e: return f'{type(e).__name__}: {str(e).splitlines()[0]}'
            return round(100*(cut(again.net[0].weight) + cut(again.net[3].weight))/240)

    def cut_after_resume(self): return self._resumed()
    def cut_after_resume_not_made_permanent(self): return self._resumed(make_pruning_permanent=False)


class TorchPruning:
    distribution = 'torch-pruning'

    def _halve(self, model, example, ignore=()):
        import torch_pruning as tp
        tp.pruner.MagnitudePruner(model, example, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=.5, ignored_layers=list(ignore)).step()

    def removed_of_100_equal_units(self):
        model = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 2))
        nn.init.ones_(model[0].weight), nn.init.ones_(model[2].weight)
        self._halve(model, torch.randn(1, 10), [model[2]])
        return 100 - model[0].out_features

    def millions_of_weights_after_half_the_filters(self): return resnet_after(lambda model: self._halve(model, torch.randn(1, 3, 64, 64), [model.fc]))

    def old_optimizer_still_fits(self):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=.1)
        self._halve(model, torch.randn(2, 10), [model[3]])
        held = {id(p) for g in optimizer.param_groups for p in g['params']}
        return all(id(p) in held for p in model.parameters())

    def state_dict_fits_plain_model(self):
        model = net()
        self._halve(model, torch.randn(2, 10), [model[3]])
        return {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in net().state_dict().items()}

    def values_of_kept_units_unchanged(self):
        model, before = net(), net()[0].weight
        self._halve(model, torch.randn(2, 10), [model[3]])
        return all(any(torch.equal(row, old) for old in before) for row in model[0].weight)

    def removing_what_lth_nb_cut_keeps_outputs(self):
        "Filters cut by lth_nb, removed by their numbers; are outputs the same, and how many weights are stored before and after?"
        import torch_pruning as tp
        from lth_nb.sparsifier import Sparsifier
        torch.manual_seed(0)
        model, x = conv_net().eval(), torch.randn(2, 3, 4, 4)
        sparsifier = Sparsifier(model, 'filter', 'local', layers=['0.weight'], batch=x)
        sparsifier.prune(50)
        gone = [i for i, keep in enumerate(sparsifier.mask['0.weight'].flatten(1).any(1)) if not keep]
        before, outputs = sum(p.numel() for p in model.parameters()), model(x)
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
        graph.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=gone).prune()
        return [torch.allclose(model(x), outputs, atol=1e-6), before, sum(p.numel() for p in model.parameters())]


# facebookresearch/open_lth was read and not run: each fact with its file, and below the commit the file was read at.
READ = {'open_lth': dict(
    cut_of_100_equal=[100, 'pruning/sparse_global.py', 'keeps what is greater than the 51st value: equal ones go together'],
    cut_of_100_distinct=[51, 'pruning/sparse_global.py', 'the 51st value itself is cut too'],
    cut_by_default=['weights of Conv2d and Linear', 'models/base.py', 'prunable_layer_names; a strategy may ignore layers'],
    steps_pruned_not_rewound=[0, 'lottery/runner.py', 'the mask is made between two trainings'],
    optimizer_state_survives=[False, 'training/train.py', 'each level makes a new optimizer'],
    batch_norm_statistics=['rewind point', 'lottery/runner.py', "each level loads the rewind point's state_dict"],
    batch_norm_weight=['rewind point', 'lottery/runner.py', 'the same'],
    learning_rate_goes_back=[True, 'training/train.py', 'the schedule is advanced to the start step'],
    batches_come_again=['if data_order_seed is set', 'training/train.py', 'the order is shuffled from seed + epoch; None shuffles anew'],
    every_rewind_to_same_weights=[True, 'lottery/runner.py', 'always from the stored file of level 0'],
    rewind_inside_epoch=['yes', 'lottery/desc.py', '--rewinding_steps=500it; the batches before it are passed over'],
    state_dict_plain_after_fit=[True, 'pruning/pruned_model.py', 'saves the model inside; the mask is a file of its own'],
    resume=[True, 'training/checkpointing.py', 'after each epoch, with the optimizer; no random generators'],
    controls=[['randomly_prune', 'randomly_reinitialize', 'retrain'], 'README.md', 'section 2.7: branches'],
    replicates=[True, 'README.md', 'section 2.9: --replicate; intervals are for the reader to work out'],
    models=['LeNets for MNIST, VGG and ResNets for CIFAR-10, ResNets for ImageNet', 'README.md', 'section 2.11; others by adding a class'],
    ticket_file=['torch.save of masks and state_dicts', 'pruning/mask.py', 'through the platform class'])}

COMMITS = {'pruning/sparse_global.py': '773470d', 'models/base.py': '29d1f6b', 'lottery/runner.py': 'fd37959', 'training/train.py': '011efd8', 'lottery/desc.py': '4ae1249',
           'pruning/pruned_model.py': 'fd37959', 'training/checkpointing.py': 'fd37959', 'README.md': '47717f4', 'pruning/mask.py': '1b98dc6'}
LIBRARIES = dict(fasterai=Fasterai, lth_nb=LthNb, torch_prune=TorchPrune, lightning=Lightning, torch_pruning=TorchPruning)


def check(library):
    "All facts of a library, by name."
    found = {}
    for name in sorted(n for n in dir(library) if not n.startswith('_') and callable(getattr(library, n))):
        with warnings.catch_warnings():
            if name != 'percent_accepted': warnings.simplefilter('ignore')
            found[name] = getattr(library, name)()
    return found


def main(names):
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    logging.disable(logging.WARNING)
    for name in names or LIBRARIES:
        library = LIBRARIES[name]()
        try: known[name] = dict(version=version(library.distribution), torch=torch.__version__.split('+')[0], date=time.strftime('%Y-%m-%d'), how='run', facts=check(library))
        except PackageNotFoundError: print(f'{name}: not installed, not checked; ' + (f'kept what was found for {known[name]["version"]} on {known[name]["date"]}' if name in known else 'nothing known'))
    for name, facts in READ.items():
        known[name] = dict(version='main', date='2026-11-22', how='read, not run', facts={n: v for n, (v, _, _) in facts.items()}, source={n: f'{file} at {COMMITS[file]}: {why}' for n, (_, file, why) in facts.items()})
    FILE.write_text(json.dumps(known, indent=1) + '\n')


if __name__ == '__main__': main(sys.argv[1:])
