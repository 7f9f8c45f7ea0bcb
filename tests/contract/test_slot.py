import torch
from tests.contract.slot import SlotContract
from tests.slots.parts import Model, Prover, Scaled, everywhere, kernel, off_by_one_kernel, scale_kernel, swap
from torch import nn

from kernelswap.apply import apply


class OneModule(SlotContract):
    check = "off"

    def make(self):
        torch.manual_seed(0)
        return Model().eval()

    def call(self, model):
        with torch.no_grad():
            return model(torch.linspace(-1, 1, 24).reshape(3, 8))

    def install(self, model):
        return apply(model, everywhere(model, off_by_one_kernel), Prover(), check=self.check)

    def wrap(self, model):
        nn.utils.parametrize.register_parametrization(model.norm, "weight", nn.Identity())
        return lambda: nn.utils.parametrize.remove_parametrizations(model.norm, "weight")


class TestModule(OneModule):
    pass


class TestModuleChecked(OneModule):
    check = "first-use"


class TestModuleAlwaysChecked(OneModule):
    check = "always"


class OneFunction(OneModule):
    def make(self):
        torch.manual_seed(0)
        return nn.Sequential(Scaled(8), Scaled(8)).eval()

    def install(self, model):
        one = kernel(scale_kernel, kind="function")
        return apply(model, [swap("0", one, name="scale"), swap("1", one, name="scale")], Prover(), check=self.check)

    def wrap(self, model):
        inner = model[0].forward
        model[0].forward = lambda x: inner(x) * 2
        return lambda: delattr(model[0], "forward")


class TestFunction(OneFunction):
    pass


class TestFunctionChecked(OneFunction):
    check = "first-use"
