/* What a value that was read looked like, and whether anybody holds it: for containers of plain values, in one step each.

   A picture names the containers in a value, by address, and keeps the objects that cannot change, by reference, in the order in
   which they are met. As long as a value shows the same ones in the same places, it has not changed. Nothing is hashed and
   nothing pickled, and a picture takes a pointer for each member, where the pickle that it stands for takes what they weigh.

   An address may have been given to another container meanwhile; but one that shows the same members in the same place *is* what
   was there. That no container occurs twice in what was just loaded is made sure of: so two places cannot come to share one
   unnoticed, since at least one of them shows another address then. */

#include "tier.h"

#define MOST 20000 /* members; beyond that, and for deeper values, pickles are compared */
#define DEEPEST 50
#define VALUE 2 /* of `_changes.Held` */

typedef struct {
    PyObject_VAR_HEAD
    PyObject *slots[1]; /* references to leaves; containers as address | 1, followed by their length << 3 | kind << 1 | 1 */
} Picture;

typedef struct {
    PyObject **slots;
    Py_ssize_t n, room;
    PyObject *first[64];
} Sketch;

static PyObject *immutable, *atoms; /* the types of what cannot change, and of what `held` does not look at */
static PyObject *ask_python;        /* `_changes.held` */

enum { LIST, DICT, TUPLE, NONE };

static inline int
kind_of(PyObject *value)
{
    PyTypeObject *type = Py_TYPE(value);
    return type == &PyDict_Type ? DICT : type == &PyList_Type ? LIST : type == &PyTuple_Type ? TUPLE : NONE;
}

static inline Py_ssize_t
length_of(PyObject *value, int kind)
{
    return kind == DICT ? PyDict_GET_SIZE(value) : PySequence_Fast_GET_SIZE(value);
}

static inline int
is_tag(const PyObject *slot)
{
    return (uintptr_t)slot & 1;
}

static inline PyObject *
tag(uintptr_t number)
{
    return (PyObject *)(number | 1);
}

static inline uintptr_t
length_tag(PyObject *value, int kind)
{
    return (uintptr_t)length_of(value, kind) << 3 | (uintptr_t)kind << 1;
}

/* Whether a value's type is in a set; no code of the user's runs. */
static int
is_of(PyObject *value, PyObject *types)
{
    PyTypeObject *type = Py_TYPE(value);
    return Py_IS_TYPE(type, &PyType_Type) && types != NULL && PySet_Contains(types, (PyObject *)type) > 0;
}

static int
is_leaf(PyObject *value)
{
    return is_fixed(value) || (kind_of(value) == NONE && is_of(value, immutable));
}

static int
put(Sketch *sketch, PyObject *slot)
{
    if (sketch->n == sketch->room) {
        Py_ssize_t room = sketch->room * 4;
        PyObject **slots = PyMem_Malloc((size_t)room * sizeof(PyObject *));
        if (slots == NULL) {
            return 0;
        }
        memcpy(slots, sketch->slots, (size_t)sketch->n * sizeof(PyObject *));
        if (sketch->slots != sketch->first) {
            PyMem_Free(sketch->slots);
        }
        sketch->slots = slots;
        sketch->room = room;
    }
    sketch->slots[sketch->n++] = slot;
    return 1;
}

/* Draw a value and what it holds; 0 where that cannot be done. References are borrowed. */
static int
draw(Sketch *sketch, PyObject *value, int depth)
{
    int kind = kind_of(value);
    if (is_leaf(value)) {
        return put(sketch, value);
    }
    if (kind == NONE || depth > DEEPEST || sketch->n > MOST || (depth > 0 && Py_REFCNT(value) != 1)) {
        return 0;
    }
    int good = put(sketch, tag((uintptr_t)value)) && put(sketch, tag(length_tag(value, kind)));
    if (kind == DICT) {
        PyObject *key, *member;
        Py_ssize_t at = 0;
        while (good && PyDict_Next(value, &at, &key, &member)) {
            good = is_leaf(key) && put(sketch, key) && draw(sketch, member, depth + 1);
        }
        return good;
    }
    for (Py_ssize_t i = 0; good && i < length_of(value, kind); i++) {
        good = draw(sketch, PySequence_Fast_GET_ITEM(value, i), depth + 1);
    }
    return good;
}

static PyTypeObject Picture_Type;

/* The picture of a value that was just loaded, so that nobody else holds it; NULL where it is not that plain (no exception). */
PyObject *
picture_of(PyObject *value)
{
    Sketch sketch = {.room = 64};
    sketch.slots = sketch.first;
    Picture *self = NULL;
    if (draw(&sketch, value, 0)) {
        self = PyObject_NewVar(Picture, &Picture_Type, sketch.n);
        if (self == NULL) {
            PyErr_Clear();
        }
        for (Py_ssize_t i = 0; self != NULL && i < sketch.n; i++) {
            self->slots[i] = is_tag(sketch.slots[i]) ? sketch.slots[i] : Py_NewRef(sketch.slots[i]);
        }
    }
    if (sketch.slots != sketch.first) {
        PyMem_Free(sketch.slots);
    }
    return (PyObject *)self;
}

/* What a baseline takes beside the value: a picture, or what the value was loaded from. */
long long
bytes_of_baseline(PyObject *baseline)
{
    if (Py_IS_TYPE(baseline, &Picture_Type)) {
        return (long long)(Picture_Type.tp_basicsize + Py_SIZE(baseline) * Picture_Type.tp_itemsize);
    }
    return PyBytes_CheckExact(baseline) ? PyBytes_GET_SIZE(baseline) : 0;
}

/* Whether two objects that cannot change are one value, of one type; False where that takes more than a look. */
static int
is_equal(PyObject *a, PyObject *b)
{
    if (a == b) {
        return 1;
    }
    if (Py_TYPE(a) != Py_TYPE(b)) {
        return 0;
    }
    if (PyFloat_CheckExact(a)) { /* not by ==, to which NaN is no NaN, and -0.0 is 0.0 */
        return !memcmp(&((PyFloatObject *)a)->ob_fval, &((PyFloatObject *)b)->ob_fval, sizeof(double));
    }
    if (PyUnicode_CheckExact(a) || PyBytes_CheckExact(a) || PyLong_CheckExact(a)) {
        return PyObject_RichCompareBool(a, b, Py_EQ) > 0;
    }
    return 0;
}

static int
is_same(const Picture *self, Py_ssize_t *at, PyObject *value)
{
    if (*at >= Py_SIZE(self)) {
        return 0;
    }
    PyObject *slot = self->slots[(*at)++];
    if (!is_tag(slot)) {
        return is_equal(slot, value);
    }
    int kind = kind_of(value);
    if (slot != tag((uintptr_t)value) || kind == NONE || self->slots[(*at)++] != tag(length_tag(value, kind))) {
        return 0;
    }
    int same = 1;
    if (kind == DICT) {
        PyObject *key, *member;
        Py_ssize_t place = 0;
        while (same && PyDict_Next(value, &place, &key, &member)) {
            same = *at < Py_SIZE(self) && !is_tag(self->slots[*at]) && is_equal(self->slots[*at], key);
            ++*at;
            same = same && is_same(self, at, member);
        }
        return same;
    }
    for (Py_ssize_t i = 0; same && i < length_of(value, kind); i++) {
        same = is_same(self, at, PySequence_Fast_GET_ITEM(value, i));
    }
    return same;
}

/* Whether a value still looks as it did. */
int
picture_matches(PyObject *picture, PyObject *value)
{
    Py_ssize_t at = 0;
    return Py_IS_TYPE(picture, &Picture_Type) && is_same((Picture *)picture, &at, value) && at == Py_SIZE(picture);
}

/* Who else can change a value that the caller has `own` references to: 0 nobody, VALUE, or -1 where that is not known. */
static int
holders(PyObject *value, Py_ssize_t own, int depth, int *n_left)
{
    if (is_fixed(value) || is_of(value, atoms)) {
        return 0;
    }
    int kind = kind_of(value), held = 0;
    if (kind == NONE || depth > DEEPEST || --*n_left < 0) {
        return -1;
    }
    if (Py_REFCNT(value) > own) {
        return depth > 0 || kind == TUPLE ? -1 : VALUE; /* a member may be shared within the value, a tuple may hold nothing */
    }
    if (kind == DICT) {
        PyObject *key, *member;
        Py_ssize_t at = 0;
        while (held == 0 && PyDict_Next(value, &at, &key, &member)) {
            held = is_fixed(key) || is_of(key, atoms) ? holders(member, 1, depth + 1, n_left) : -1;
        }
        return held;
    }
    for (Py_ssize_t i = 0; held == 0 && i < length_of(value, kind); i++) {
        held = holders(PySequence_Fast_GET_ITEM(value, i), 1, depth + 1, n_left);
    }
    return held;
}

/* As `who_holds`, at a glance: 0 nobody, VALUE, or -1 where it has to be asked of Python. */
int
held_at_a_glance(Entry *entry)
{
    int n_left = MOST;
    return holders(entry->value, 1, 0, &n_left);
}

/* Who but its entry holds a value, or something inside it that can change, as a `Held`; -1 with an exception set. */
int
holders_of(Entry *entry)
{
    int held = held_at_a_glance(entry);
    if (held < 0) {
        PyObject *value = Py_NewRef(entry->value), *one = PyLong_FromLong(1);
        PyObject *answer = one == NULL ? NULL : PyObject_CallFunctionObjArgs(ask_python, value, one, NULL);
        held = answer == NULL ? -1 : (int)PyLong_AsLong(answer);
        Py_XDECREF(answer);
        Py_XDECREF(one);
        Py_DECREF(value);
    }
    return held;
}

static void
Picture_dealloc(Picture *self)
{
    for (Py_ssize_t i = 0; i < Py_SIZE(self); i++) {
        if (!is_tag(self->slots[i])) {
            Py_DECREF(self->slots[i]);
        }
    }
    PyObject_Free(self);
}

static PyObject *
Picture_matches(PyObject *self, PyObject *value)
{
    return PyBool_FromLong(picture_matches(self, value));
}

static PyMethodDef Picture_methods[] = {
    {"matches", Picture_matches, METH_O, "Whether a value still looks as it did."},
    {NULL},
};

static PyTypeObject Picture_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "chest._native.Picture",
    .tp_doc = "What a value that was read looked like.",
    .tp_basicsize = offsetof(Picture, slots),
    .tp_itemsize = sizeof(PyObject *),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_dealloc = (destructor)Picture_dealloc,
    .tp_methods = Picture_methods,
};

static PyObject *
picture(PyObject *Py_UNUSED(module), PyObject *value)
{
    PyObject *found = picture_of(value);
    return found == NULL ? Py_NewRef(Py_None) : found;
}

static PyObject *
who_holds(PyObject *Py_UNUSED(module), PyObject *entry)
{
    if (!Py_IS_TYPE(entry, &Entry_Type)) {
        PyErr_SetString(PyExc_TypeError, "an entry is needed");
        return NULL;
    }
    int held = holders_of((Entry *)entry);
    return held < 0 ? NULL : PyLong_FromLong(held);
}

/* Told once: which types cannot change, which types `held` passes over, and `held` itself. */
static PyObject *
setup_pictures(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *fixed, *passed, *held;
    if (!PyArg_ParseTuple(args, "O!O!O:setup_pictures", &PySet_Type, &fixed, &PySet_Type, &passed, &held)) {
        return NULL;
    }
    Py_XSETREF(immutable, Py_NewRef(fixed));
    Py_XSETREF(atoms, Py_NewRef(passed));
    Py_XSETREF(ask_python, Py_NewRef(held));
    Py_RETURN_NONE;
}

static PyObject *
baseline_bytes(PyObject *Py_UNUSED(module), PyObject *baseline)
{
    return PyLong_FromLongLong(bytes_of_baseline(baseline));
}

static PyMethodDef functions[] = {
    {"baseline_bytes", baseline_bytes, METH_O, NULL},
    {"picture", picture, METH_O, NULL},
    {"who_holds", who_holds, METH_O, NULL},
    {"setup_pictures", setup_pictures, METH_VARARGS, NULL},
    {NULL},
};

int
pictures_ready(PyObject *module)
{
    return PyType_Ready(&Picture_Type) < 0 || PyModule_AddFunctions(module, functions) < 0 ? -1 : 0;
}
