/* The hot paths in C. Everything here is in Python, too (`_memory.py`, `_hot.py`), for where there is no compiler. */

#include "tier.h"

int state_ready(PyObject *module);
int rows_ready(PyObject *module);
int sizes_ready(PyObject *module);
int pictures_ready(PyObject *module);

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "chest._native",
    .m_doc = "The hot paths of chest, compiled.",
    .m_size = -1,
};

PyMODINIT_FUNC
PyInit__native(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && (tier_ready(module) < 0 || state_ready(module) < 0 || rows_ready(module) < 0 ||
                           sizes_ready(module) < 0 || pictures_ready(module) < 0)) {
        Py_CLEAR(module);
    }
    return module;
}
