"""Make Triton's interpreter faster without changing its results.

For small tensors, it spends most of its time on Python objects that describe types, and on checks
whose results it discards. test_fast_interpreter.py compares results and errors with those of the
unchanged interpreter.
"""

import dataclasses
import functools
import inspect


def speed_up(interpreter) -> None:
    core = interpreter.tl.core
    _patch_modules_once(interpreter)
    _find_builtins_once(interpreter)
    _compute_no_discarded_checks(interpreter)
    _copy_types(core)
    _answer_easy_cases_first(core)
    _remember_dtypes(interpreter)


def _patch_modules_once(interpreter) -> None:
    """Replace triton.language's functions once for each launch, not in each call of a function."""
    patch, done = interpreter._patch_lang, set()

    def patch_lang(function):
        if function.__module__ in done:  # this launch has patched the module already
            return None
        scope = patch(function)
        if not done:  # the outermost call of a launch undoes all patches
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        done.add(function.__module__)
        return scope

    interpreter._patch_lang = patch_lang


def _find_builtins_once(interpreter) -> None:
    """Make what replaces triton.language's functions once, and without the steps between."""
    semantic = interpreter.TritonSemantic(interpreter.interpreter_builder)
    is_builtin, found = interpreter.tl.core.is_builtin, {}

    def interpreted(member):
        function = getattr(member, "__wrapped__", member)  # the wrapper only checks _semantic

        def call(*args, _semantic=None, **kwargs):
            return function(*args, _semantic=semantic, **kwargs)

        return call

    def patch_builtin(owner, builder, scope):
        if owner not in found:
            members = inspect.getmembers(owner, is_builtin)
            found[owner] = [(name, interpreted(member)) for name, member in members]
        for name, function in found[owner]:
            scope.set_attr(owner, name, function)

    interpreter._patch_builtin = patch_builtin


def _compute_no_discarded_checks(interpreter) -> None:
    """Leave out the check of each integer operation for overflow.

    The interpreter computes each sum, difference and product again in int64, and compares it with
    the limits of the type. It discards the comparison, because assertions need options.debug.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _copy_types(core) -> None:
    """Copy what the constructors of tensors and block types compute from an earlier equal one."""
    constexpr = core.constexpr
    make_block_type, block_types, shapes = core.block_type.__init__, {}, {}
    make_tensor, tensors = core.tensor.__init__, {}

    def block_type(self, element_ty, shape):
        sizes = tuple([size.value if isinstance(size, constexpr) else size for size in shape])
        attributes = block_types.get((element_ty.name, sizes))
        if attributes is None:
            make_block_type(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)  # equal shapes are one object
            block_types[element_ty.name, sizes] = vars(self).copy()
        else:
            vars(self).update(attributes)
            self.element_ty = element_ty

    def tensor(self, handle, type):
        attributes = tensors.get(type.name)
        if attributes is None:
            make_tensor(self, handle, type)
            tensors[type.name] = vars(self) | {"handle": None}
        else:
            vars(self).update(attributes)
            self.handle, self.type, self.dtype = handle, type, type.scalar

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


def _answer_easy_cases_first(core) -> None:
    """Compare the same type and unwrap numbers without the general steps."""
    unwrap, constexpr, nested = core._unwrap_if_constexpr, core.constexpr, (list, tuple, core.tuple)

    def unwrap_if_constexpr(value):
        if isinstance(value, constexpr):
            return value.value
        return unwrap(value) if isinstance(value, nested) else value

    core._unwrap_if_constexpr = unwrap_if_constexpr
    for kind in (core.dtype, core.pointer_type, core.block_type):

        def equal(self, other, equal=kind.__eq__):
            return self is other or equal(self, other)

        kind.__eq__ = equal


def _remember_dtypes(interpreter) -> None:
    """Remember the dtypes of arrays and of results, and leave tensors of one shape as they are."""
    pointer, find = interpreter.tl.pointer_type, interpreter._get_np_dtype
    find_scalar = functools.cache(find)

    def get_np_dtype(dtype):
        scalar = dtype.scalar
        # Pointer types are not hashable.
        return find(scalar) if isinstance(scalar, pointer) else find_scalar(scalar)

    interpreter._get_np_dtype = get_np_dtype

    semantic = interpreter.TritonSemantic
    choose, chosen = semantic.computation_type_impl, {}
    broadcast = semantic.broadcast_impl_value

    def computation_type_impl(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod):
        key = a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod
        if key not in chosen:
            chosen[key] = choose(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return chosen[key]

    def broadcast_impl_value(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and a.shape is b.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.computation_type_impl = computation_type_impl
    semantic.broadcast_impl_value = broadcast_impl_value
