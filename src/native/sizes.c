/* The bytes that containers of plain values hold: what `_sizing` walks in Python, for those that need no sampling. */

#include "tier.h"

#define MOST 20000 /* objects looked at: half a millisecond. Beyond that a sample tells enough */
#define LONGEST 1024 /* and of a longer container, too */
#define DEEPEST 60

typedef struct {
    PyObject *quick, *leaves; /* the types of containers that are measured so, and of what refers to nothing */
    void **seen;              /* open addressing, by address */
    size_t n_seen, n_slots;
    long n_left;
    long long size;
    void *first[64];
} Walk;

static PyObject *getsizeof, *sizeof_dict, *sizeof_set, *sizeof_frozenset;

/* Whether an object was met before; it has been now. -1 with an exception set. */
static int
was_seen(Walk *walk, void *address)
{
    if (walk->n_seen * 2 >= walk->n_slots) {
        size_t n = walk->n_slots * 4;
        void **slots = PyMem_Calloc(n, sizeof(void *));
        if (slots == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        for (size_t i = 0; i < walk->n_slots; i++) {
            if (walk->seen[i] != NULL) {
                size_t at = ((size_t)walk->seen[i] >> 4) * 0x9E3779B97F4A7C15u & (n - 1);
                while (slots[at] != NULL) {
                    at = (at + 1) & (n - 1);
                }
                slots[at] = walk->seen[i];
            }
        }
        if (walk->seen != walk->first) {
            PyMem_Free(walk->seen);
        }
        walk->seen = slots;
        walk->n_slots = n;
    }
    size_t at = ((size_t)address >> 4) * 0x9E3779B97F4A7C15u & (walk->n_slots - 1);
    while (walk->seen[at] != NULL) {
        if (walk->seen[at] == address) {
            return 1;
        }
        at = (at + 1) & (walk->n_slots - 1);
    }
    walk->seen[at] = address;
    walk->n_seen++;
    return 0;
}

/* Add what a function of one argument says. 1, or -1 with an exception set. */
static int
add_answer(Walk *walk, PyObject *function, PyObject *value, long long more)
{
    PyObject *answer = PyObject_CallOneArg(function, value);
    if (answer == NULL) {
        return -1;
    }
    long long size = PyLong_AsLongLong(answer);
    Py_DECREF(answer);
    if (size == -1 && PyErr_Occurred()) {
        return -1;
    }
    walk->size += size + more;
    return 1;
}

#define GC_HEAD ((long long)(2 * sizeof(void *))) /* `sys.getsizeof` counts it, `__sizeof__` does not */

/* Add an object and what it holds: 1; 0 where it is not that simple; -1 with an exception set. */
static int
add(Walk *walk, PyObject *value, int depth)
{
    PyTypeObject *type = Py_TYPE(value);
    if (--walk->n_left < 0 || depth > DEEPEST) {
        return 0;
    }
    if (Py_REFCNT(value) > 1) { /* else nothing refers to it but what led here */
        int seen = was_seen(walk, value);
        if (seen) {
            return seen < 0 ? -1 : 1;
        }
    }
    if (type == &PyUnicode_Type && PyUnicode_IS_COMPACT_ASCII(value)) {
        int plain = PySet_Contains(walk->leaves, (PyObject *)type);
        if (plain > 0) {
            walk->size += (long long)sizeof(PyASCIIObject) + PyUnicode_GET_LENGTH(value) + 1;
        }
        return plain;
    }
    if (type == &PyList_Type || type == &PyTuple_Type || type == &PyDict_Type || type == &PySet_Type ||
        type == &PyFrozenSet_Type) {
        int result = PyDict_Contains(walk->quick, (PyObject *)type);
        if (result <= 0 || PyObject_Size(value) > LONGEST) {
            return result < 0 ? -1 : 0;
        }
        if (type == &PyList_Type) {
            walk->size += GC_HEAD + (long long)sizeof(PyListObject) + ((PyListObject *)value)->allocated * (long long)sizeof(void *);
            for (Py_ssize_t i = 0; result > 0 && i < PyList_GET_SIZE(value); i++) {
                result = add(walk, PyList_GET_ITEM(value, i), depth + 1);
            }
        }
        else if (type == &PyTuple_Type) {
            result = add_answer(walk, getsizeof, value, 0);
            for (Py_ssize_t i = 0; result > 0 && i < PyTuple_GET_SIZE(value); i++) {
                result = add(walk, PyTuple_GET_ITEM(value, i), depth + 1);
            }
        }
        else if (type == &PyDict_Type) {
            PyObject *key, *member;
            Py_ssize_t at = 0;
            result = add_answer(walk, sizeof_dict, value, GC_HEAD);
            while (result > 0 && PyDict_Next(value, &at, &key, &member)) {
                result = add(walk, key, depth + 1);
                if (result > 0) {
                    result = add(walk, member, depth + 1);
                }
            }
        }
        else {
            result = add_answer(walk, type == &PySet_Type ? sizeof_set : sizeof_frozenset, value, GC_HEAD);
            PyObject *members = result > 0 ? PyObject_GetIter(value) : NULL, *member;
            if (result > 0 && members == NULL) {
                return -1;
            }
            while (result > 0 && (member = PyIter_Next(members)) != NULL) {
                Py_DECREF(member); /* the set has one */
                result = add(walk, member, depth + 1);
            }
            Py_XDECREF(members);
            if (PyErr_Occurred()) {
                return -1;
            }
        }
        return result;
    }
    int leaf = PySet_Contains(walk->leaves, (PyObject *)type), overflow;
    if (leaf > 0 && type == &PyFloat_Type) {
        walk->size += (long long)sizeof(PyFloatObject);
        return 1;
    }
    if (leaf > 0 && type == &PyLong_Type) {
        long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
        if (number && !overflow && number > -(1 << 30) && number < 1 << 30) { /* one digit */
            walk->size += (long long)(PyLong_Type.tp_basicsize + PyLong_Type.tp_itemsize);
            return 1;
        }
    }
    return leaf > 0 ? add_answer(walk, getsizeof, value, 0) : leaf;
}

/* The bytes of a value and of all that it holds: 1; 0 where it is not that simple; -1 with an exception set. */
int
size_of_members(PyObject *value, PyObject *quick, PyObject *leaves, long long *size)
{
    Walk walk = {.quick = quick, .leaves = leaves, .n_left = MOST, .n_slots = 64};
    walk.seen = walk.first;
    int result = add(&walk, value, 0);
    if (walk.seen != walk.first) {
        PyMem_Free(walk.seen);
    }
    *size = walk.size;
    return result;
}

static PyObject *
size_of_plain(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n)
{
    if (n != 4 || !PyDict_CheckExact(args[0]) || !PySet_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "size_of_plain(quick, leaves, otherwise, value)");
        return NULL;
    }
    long long size;
    int result = size_of_members(args[3], args[0], args[1], &size);
    return result < 0 ? NULL : result ? PyLong_FromLongLong(size) : PyObject_CallOneArg(args[2], args[3]);
}

static PyMethodDef functions[] = {
    {"size_of_plain", (PyCFunction)(void (*)(void))size_of_plain, METH_FASTCALL, NULL},
    {NULL},
};

int
sizes_ready(PyObject *module)
{
    PyObject *sys = PyImport_ImportModule("sys");
    getsizeof = sys == NULL ? NULL : PyObject_GetAttrString(sys, "getsizeof");
    Py_XDECREF(sys);
    sizeof_dict = PyObject_GetAttrString((PyObject *)&PyDict_Type, "__sizeof__");
    sizeof_set = PyObject_GetAttrString((PyObject *)&PySet_Type, "__sizeof__");
    sizeof_frozenset = PyObject_GetAttrString((PyObject *)&PyFrozenSet_Type, "__sizeof__");
    return getsizeof == NULL || sizeof_dict == NULL || sizeof_set == NULL || sizeof_frozenset == NULL ||
                   PyModule_AddFunctions(module, functions) < 0
               ? -1
               : 0;
}
