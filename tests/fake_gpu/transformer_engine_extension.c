// Stands in for Transformer Engine's compiled extension: a module with the functions of transformer_engine_functions.py.
#include <Python.h>

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "transformer_engine_torch", 0, -1, 0};

PyMODINIT_FUNC PyInit_transformer_engine_torch(void) {
    PyObject *functions = PyImport_ImportModule("fake_transformer_engine");
    if (!functions) return 0;
    PyObject *module = PyModule_Create(&definition);
    if (module) PyDict_Update(PyModule_GetDict(module), PyModule_GetDict(functions));
    return module;
}
