"""What every slot promises, whatever it is that it changes. Inherit, and say how one is made."""

import copy

import pytest
import torch

from kernelswap.errors import UndoConflict


def state_of(model):
    """What undo must bring back: classes, instance attributes by identity, hooks, tensors bit for bit."""
    return [
        (name, type(m), {k: id(v) for k, v in vars(m).items() if k != "training"}, list(m._forward_hooks), m.training)
        for name, m in model.named_modules()
    ], {k: v.clone() for k, v in model.state_dict().items()}


def same(before, after):
    """Whether two such states are equal."""
    return before[0] == after[0] and all(torch.equal(before[1][k], after[1][k]) for k in before[1])


class SlotContract:
    """Three things to give; the tests are inherited."""

    def make(self):
        """A fresh model in eval mode; two calls give models with equal outputs."""
        raise NotImplementedError

    def call(self, model):
        """One output of it, a tensor."""
        raise NotImplementedError

    def install(self, model):
        """Swap in a kernel that gives visibly other numbers; returns the Applied."""
        raise NotImplementedError

    def wrap(self, model):
        """Wrap something so that undo would not be exact, and return how to unwrap it; None where nothing can."""
        return

    def test_a_swap_is_seen_and_undone_exactly(self):
        model = self.make()
        plain, before = self.call(model), state_of(model)
        applied = self.install(model)
        assert not torch.equal(self.call(model), plain)
        applied.undo()
        assert same(before, state_of(model))
        assert torch.equal(self.call(model), plain)

    def test_undo_twice_is_fine(self):
        model = self.make()
        plain = self.call(model)
        applied = self.install(model)
        applied.undo()
        applied.undo()
        assert torch.equal(self.call(model), plain)

    def test_it_can_be_swapped_undone_and_swapped_again(self):
        model = self.make()
        plain = self.call(model)
        outputs = []
        for _ in range(3):
            with self.install(model):
                outputs.append(self.call(model))
            assert torch.equal(self.call(model), plain)
        assert all(torch.equal(o, outputs[0]) for o in outputs)

    def test_another_model_of_the_same_class_is_not_touched(self):
        model, other = self.make(), self.make()
        plain = self.call(other)
        self.install(model)
        assert torch.equal(self.call(other), plain)

    def test_the_state_dict_is_the_same(self):
        model = self.make()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        self.install(model)
        after = model.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[k], after[k]) for k in before)

    def test_undo_after_the_model_was_taken_apart(self):
        model = self.make()
        applied = self.install(model)
        for name in [*model._modules]:
            delattr(model, name)
        applied.undo()

    def test_a_deepcopy_computes_the_same_and_survives_undo_of_its_source(self):
        model = self.make()
        applied = self.install(model)
        swapped = self.call(model)
        twin = copy.deepcopy(model)
        applied.undo()
        assert torch.equal(self.call(twin), swapped)

    def test_a_wrapper_that_came_later_is_a_conflict_and_changes_nothing(self):
        model = self.make()
        applied = self.install(model)
        unwrap = self.wrap(model)
        if unwrap is None:
            pytest.skip("nothing can come between this slot and its undo")
        before = state_of(model)
        with pytest.raises(UndoConflict):
            applied.undo()
        assert same(before, state_of(model))
        unwrap()
        applied.undo()
