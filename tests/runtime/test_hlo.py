"""Operations of compiled programs, read from texts in the form that XLA prints."""

import jax
import jax.numpy as jnp
import pytest

from diffusion.runtime import hlo

TEXT = """HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %b = f32[] parameter(1)
  %a = f32[] parameter(0)
  ROOT %add = f32[] add(%a, %b)
}

%inside (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %reduced = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %y = f32[8]{0} get-tuple-element(%state), index=1
  %next = f32[8]{0} fusion(%y), kind=kLoop, calls=%sum
  ROOT %out = (s32[], f32[8]{0}) tuple(%i, %next)
}

%more (state.1: (s32[], f32[8])) -> pred[] {
  ROOT %go = pred[] constant(true)
}

ENTRY %main (p: f32[4], q: bf16[2,3]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %q = bf16[2,3]{1,0:T(8,128)(2,1)} parameter(1)
  %begun = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%p), calls=%inside
  %done = f32[4]{0} async-done(%begun)
  %gathered = (bf16[2,3]{1,0}, bf16[4,3]{1,0}) all-gather-start(%q), dimensions={0}
  %whole = bf16[4,3]{1,0} all-gather-done(%gathered)
  %both = (f32[4]{0}, f32[2]{0}) all-reduce(%done, %done), to_apply=%sum
  %start = (s32[], f32[8]{0}) tuple(%p, %p)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%more, body=%body
  ROOT %end = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_each_operation_that_takes_time_is_found_once():
    """Also within loops, and what runs asynchronously under the name of what it does."""
    assert hlo.operations(TEXT) == [
        ('all-reduce', 16, False),
        ('all-gather', 24, False),
        ('all-reduce', 24, False),
        ('fusion', 32, True),
    ]


BRANCHES = """
%one (x: f32[4]) -> f32[4] {
  ROOT %sine = f32[4]{0} sine(%x)
}

%two (x.1: f32[4]) -> f32[4] {
  ROOT %cosine = f32[4]{0} cosine(%x.1)
}

%three (x.2: f32[4]) -> f32[4] {
  ROOT %tanh = f32[4]{0} tanh(%x.2)
}

ENTRY %main (i: s32[], x.3: f32[4]) -> f32[4] {
  ROOT %chosen = f32[4]{0} conditional(%i, %x.3, %x.3, %x.3), branch_computations={%one, %two, %three}, metadata={}
}
"""


def test_all_branches_are_found():
    assert [op.name for op in hlo.operations(BRANCHES)] == ['sine', 'cosine', 'tanh']


@pytest.mark.parametrize(
    ('operation', 'nbytes'),
    [
        ('((f32[4]{0}, bf16[2]{0}), (f32[16]{0}, bf16[8]{0})) all-gather-start(%p, %q)', 64 + 16),
        ('((f32[4]{0:T(128)}, f32[2,2]{1,0:T(2,128)(2,1)}), (f32[8]{0}, f32[4,2]{1,0})) all-gather-start(%p)', 64),
        ('(f32[4]{0}, f32[16]{0}) all-gather-start(%p)', 64),
        ('(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p)', 16),
        ('((f32[4]{0}, f32[2]{0}), (f32[4]{0}, f32[2]{0}), u32[]) collective-permute-start(%p, %q)', 24),
        ('(f32[4]{0}, f32[2]{0}) all-reduce-start(%p, %q), to_apply=%sum', 24),
        ('f32[4]{0} all-reduce-start(%p), to_apply=%sum', 16),
        ('((f32[16]{0}), f32[4]{0}, u32[]) reduce-scatter-start(%p), to_apply=%sum', 16),
        ('(f32[4]{0:S(5)}, f32[4]{0}, u32[]) copy-start(%p)', 16),
    ],
)
def test_what_starts_counts_its_results_and_not_its_operands(operation, nbytes):
    text = f'ENTRY %main (p: f32[4], q: f32[2]) -> f32[4] {{\n  %begun = {operation}\n}}\n'
    assert [op.nbytes for op in hlo.operations(text)] == [nbytes]


def test_a_scatter_that_is_started_is_found_by_its_own_name():
    text = """
%inside (x: f32[16]) -> f32[4] {
  ROOT %part = f32[4]{0} reduce-scatter(%x), dimensions={0}, to_apply=%sum
}

ENTRY %main (p: f32[16]) -> f32[4] {
  %begun = ((f32[16]{0}), f32[4]{0}) async-start(%p), calls=%inside
  ROOT %end = f32[4]{0} async-done(%begun)
}
"""
    assert hlo.collectives(hlo.operations(text)) == {'reduce-scatter': {'count': 1, 'bytes': 16}}


def test_messages_are_counted_by_kind():
    found = hlo.collectives(hlo.operations(TEXT))
    assert found == {'all-reduce': {'count': 2, 'bytes': 40}, 'all-gather': {'count': 1, 'bytes': 24}}


def test_a_program_of_this_machine():
    """A loop around one product: the product is in the loop, and no message is sent."""
    program = (
        jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda _, y: jnp.sin(y @ x), x)).lower(jnp.ones((64, 64))).compile()
    )
    found = hlo.operations(program.as_text())
    assert any(op.in_loop and op.nbytes == 64 * 64 * 4 for op in found)
    assert hlo.collectives(found) == {}
