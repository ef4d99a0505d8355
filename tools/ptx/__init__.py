"""Run kernels that were compiled to PTX on a CPU, and report their faults: races, bounds, fences.

build.py compiles the C++ here and loads it; machine.py has ``Program``, which runs one kernel.
parse.py reads PTX, translate.py, families.py and hopper.py make instructions of it, registers.py
gives registers places; tensor_map.py makes tensor maps.
run.cpp schedules blocks and warps; memory.cpp finds races; control.cpp has branches, barriers and
shuffles, loads.cpp memory accesses and cp.async, matrix.cpp mma and wgmma, bulk.cpp copies of
tensors (TMA), mbarrier.cpp barriers that count their bytes, cluster.cpp what specialised warps use.
driver.py sends Triton's launches here, arguments.py packs their arguments, schedules.py runs each
in several orders.

To add an opcode that treats each lane alone, write one line, ``OPCODE``, in integer.cpp or
floating.cpp. An opcode with another syntax also needs a function in ``FAMILIES`` of families.py.
docs/compiled-kernels.md shows both, with their tests, and what this machine cannot show.
"""
