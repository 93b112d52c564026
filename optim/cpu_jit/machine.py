"""Compilation of LLVM assembly to machine code of this processor."""

from collections.abc import Callable

from optim.cpu_jit import disk


def compiled(text: str) -> tuple[Callable[[str], int], object]:
    """Compile a module, or load its machine code if an earlier process has compiled it; see `disk`.

    Args:
        text: The assembly.

    Returns:
        A function from the name of a function to its address, and the object that owns the code.
    """
    import llvmlite
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=2, jit=True)
    versions = (llvmlite.__version__, ".".join(map(str, llvm.llvm_version_info)), machine.triple)
    key = disk.key_of((text, cpu, features, *versions))
    code = disk.load(key)
    if code is None:
        module = llvm.parse_assembly(text)
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        options.loop_vectorization = True
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        code = machine.emit_object(module)
        disk.save(key, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine.get_function_address, engine
