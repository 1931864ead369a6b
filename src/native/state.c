/* The state of a chest that its quickest calls need, and these calls: a hit, a set that evicts nothing, `in`.

   Whatever is not that simple is left to Python, by the methods `_get_slowly`, `_set_slowly`, `_delete_slowly` and
   `_contains_slowly`. `_hot.py` has the same in Python. */

#include "tier.h"
#include <time.h>

typedef struct {
    PyObject_HEAD
    PyObject *lock, *tier, *entries, *dirty, *unsure, *tombs, *lent, *transaction, *failed, *generation, *store;
    Py_buffer view; /* of the generation */
    unsigned long long seen, next_seq;
    long long epoch, hits, misses, n_commits;
    int salt;
    char closed, write_through, plain;
} State;

#define MANY_LENT 16

/* `nbytes`, the types whose values `sys.getsizeof` measures, those containers that need no walk in Python, and `is_immutable`. */
static PyObject *measure, *leaves, *quick, *is_immutable;

#define TEXTS(_)                                                                                                               \
    _(acquire)                                                                                                                 \
    _(codec)                                                                                                                   \
    _(index)                                                                                                                   \
    _(loads)                                                                                                                   \
    _(look_up)                                                                                                                 \
    _(release)                                                                                                                 \
    _(_absent)                                                                                                                 \
    _(_contains_slowly)                                                                                                        \
    _(_delete_slowly)                                                                                                          \
    _(_get_slowly)                                                                                                             \
    _(_make_room)                                                                                                              \
    _(_poll)                                                                                                                   \
    _(_set_slowly)
#define DECLARE(name) static PyObject *text_##name;
TEXTS(DECLARE)
#undef DECLARE

static PyObject *
State_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    State *self = (State *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->closed = 1; /* until it is open */
    }
    return (PyObject *)self;
}

static int
State_traverse(State *self, visitproc visit, void *arg)
{
    Py_VISIT(self->lock);
    Py_VISIT(self->tier);
    Py_VISIT(self->entries);
    Py_VISIT(self->dirty);
    Py_VISIT(self->unsure);
    Py_VISIT(self->tombs);
    Py_VISIT(self->lent);
    Py_VISIT(self->transaction);
    Py_VISIT(self->failed);
    Py_VISIT(self->generation);
    Py_VISIT(self->store);
    return 0;
}

static int
State_clear(State *self)
{
    if (self->view.obj != NULL) {
        PyBuffer_Release(&self->view);
    }
    Py_CLEAR(self->generation);
    Py_CLEAR(self->store);
    Py_CLEAR(self->lock);
    Py_CLEAR(self->tier);
    Py_CLEAR(self->entries);
    Py_CLEAR(self->dirty);
    Py_CLEAR(self->unsure);
    Py_CLEAR(self->tombs);
    Py_CLEAR(self->lent);
    Py_CLEAR(self->transaction);
    Py_CLEAR(self->failed);
    return 0;
}

static void
State_dealloc(State *self)
{
    PyObject_GC_UnTrack(self);
    State_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *
State_get_generation(State *self, void *Py_UNUSED(closure))
{
    return Py_NewRef(self->generation == NULL ? Py_None : self->generation);
}

static int
State_set_generation(State *self, PyObject *generation, void *Py_UNUSED(closure))
{
    if (generation == self->generation) {
        return 0;
    }
    Py_buffer view = {0};
    if (generation == NULL || PyObject_GetBuffer(generation, &view, PyBUF_SIMPLE) < 0) {
        return -1;
    }
    if (view.len < 8 || (uintptr_t)view.buf % 8) {
        PyBuffer_Release(&view);
        PyErr_SetString(PyExc_ValueError, "a generation is one aligned item of eight bytes");
        return -1;
    }
    if (self->view.obj != NULL) {
        PyBuffer_Release(&self->view);
    }
    self->view = view;
    Py_XSETREF(self->generation, Py_NewRef(generation));
    return 0;
}

/* The entry of a key, if nothing was committed since it was last found to be the newest; NULL, maybe with an exception. */
static inline Entry *
current_entry(State *self, PyObject *key)
{
    if (self->entries == NULL || !PyDict_CheckExact(self->entries) || self->view.obj == NULL) {
        return NULL;
    }
    Entry *entry = (Entry *)PyDict_GetItemWithError(self->entries, key);
    if (entry != NULL && Py_IS_TYPE(entry, &Entry_Type) && entry->epoch == self->epoch &&
        *(volatile unsigned long long *)self->view.buf == self->seen) {
        return entry;
    }
    return NULL;
}

/* Bytes that a value takes, as `nbytes` says; -1 with an exception set. */
static long long
size_of_value(PyObject *value)
{
    PyTypeObject *type = Py_TYPE(value);
    PyObject *result;
    int leaf = PySet_Contains(leaves, (PyObject *)type);
    if (leaf < 0) {
        return -1;
    }
    if (leaf && type == &PyUnicode_Type && PyUnicode_IS_COMPACT_ASCII(value)) {
        return (long long)sizeof(PyASCIIObject) + PyUnicode_GET_LENGTH(value) + 1;
    }
    if (leaf && type == &PyBytes_Type) {
        return (long long)PyBytes_Type.tp_basicsize + PyBytes_GET_SIZE(value);
    }
    if (!leaf) {
        long long bytes = 0;
        int walked = size_of_members(value, quick, leaves, &bytes);
        if (walked) {
            return walked < 0 ? -1 : bytes;
        }
    }
    result = PyObject_CallOneArg(measure, value);
    if (result == NULL) {
        return -1;
    }
    int overflow;
    long long size = PyLong_AsLongLongAndOverflow(result, &overflow);
    Py_DECREF(result);
    return overflow ? (long long)1 << 56 : size;
}

static int
is_simple_key(PyObject *key)
{
    int overflow = 0;
    if (PyUnicode_CheckExact(key)) {
        return PyUnicode_GET_LENGTH(key) < 200;
    }
    return PyLong_CheckExact(key) && (PyLong_AsLongLongAndOverflow(key, &overflow), !overflow);
}

/* Whether this thread may take a short way into the state; the lock, which is then held, or NULL, maybe with an exception. */
static PyObject *
enter(State *self, PyObject *key)
{
    if (!self->plain || self->transaction != Py_None || self->lock == NULL || self->tier == NULL ||
        !Py_IS_TYPE(self->tier, &Tier_Type) || !is_simple_key(key)) {
        return NULL;
    }
    PyObject *lock = Py_NewRef(self->lock);
    PyObject *result = PyObject_CallMethodNoArgs(lock, text_acquire);
    if (result == NULL) {
        Py_CLEAR(lock);
    }
    Py_XDECREF(result);
    return lock;
}

/* An exception that is set stays set. */
static int
leave(PyObject *lock)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject *result = PyObject_CallMethodNoArgs(lock, text_release);
    Py_DECREF(lock);
    if (result == NULL) {
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(traceback);
        return -1;
    }
    Py_DECREF(result);
    PyErr_Restore(type, error, traceback);
    return 0;
}

/* Whether the exception that is set is one that Python shall raise, with all that is to be said: it is forgotten here. */
static int
is_left_to_python(void)
{
    if (PyErr_ExceptionMatches(PyExc_Exception)) {
        PyErr_Clear();
        return 1;
    }
    return 0;
}

static inline int
is_dict(PyObject *object)
{
    return object != NULL && PyDict_CheckExact(object);
}

/* Whether, under the lock, all is as it mostly is; an exception may be set if not. Subclasses may name their attributes so. */
static int
is_simple(State *self)
{
    return !self->closed && self->plain && self->transaction == Py_None && is_dict(self->entries) && is_dict(self->dirty) &&
           is_dict(self->unsure) && is_dict(self->tombs) && PyDict_GET_SIZE(self->tombs) == 0 && PyObject_Size(self->lent) == 0;
}

/* The record of a key under the lock, None where there is none; NULL where it is not that simple, maybe with an exception. */
static PyObject *
fetch(State *self, PyObject *key)
{
    if (!is_simple(self) || self->view.obj == NULL || *(volatile unsigned long long *)self->view.buf != self->seen) {
        return NULL;
    }
    int here = PyDict_Contains(self->entries, key);
    PyObject *name = here == 0 ? simple_name(key) : NULL;
    PyObject *index = name == NULL || self->store == NULL ? NULL : PyObject_GetAttr(self->store, text_index);
    PyObject *look_up = index == NULL ? NULL : PyObject_GetAttr(index, text_look_up);
    PyObject *record = look_up == NULL ? NULL : PyObject_CallOneArg(look_up, name);
    Py_XDECREF(look_up);
    Py_XDECREF(index);
    Py_XDECREF(name);
    if (record == Py_NotImplemented) {
        Py_CLEAR(record);
    }
    return record;
}

/* A value that was read, and what is to be known of it. */
typedef struct {
    PyObject *value, *baseline; /* NULL: it cannot change */
    unsigned long long seq, version;
} Loaded;

/* The value behind a record of the index; 0 where it is not that simple, maybe with an exception. */
static int
load(State *self, PyObject *record, Loaded *loaded)
{
    if (!PyTuple_Check(record) || PyTuple_GET_SIZE(record) != 4) {
        return 0;
    }
    PyObject *body = PyTuple_GET_ITEM(record, 3);
    loaded->version = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(record, 0));
    loaded->seq = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(record, 1));
    long long kind = PyLong_AsLongLong(PyTuple_GET_ITEM(record, 2));
    if (PyErr_Occurred() || (kind != 0 && kind != 1) || !PyBytes_CheckExact(body)) { /* PACKED, LOOSE */
        return 0;
    }
    PyObject *codec = self->store == NULL ? NULL : PyObject_GetAttr(self->store, text_codec);
    PyObject *loads = codec == NULL ? NULL : PyObject_GetAttr(codec, text_loads);
    PyObject *value = loads == NULL ? NULL : PyObject_CallOneArg(loads, body);
    Py_XDECREF(codec);
    Py_XDECREF(loads);
    if (value == NULL) {
        return 0;
    }
    int fixed = is_fixed(value);
    loaded->baseline = fixed ? NULL : picture_of(value); /* now, before anybody else can hold it */
    if (!fixed && loaded->baseline == NULL) {
        if (!is_container(value)) {
            PyObject *answer = PyObject_CallOneArg(is_immutable, value);
            fixed = answer == NULL ? -1 : PyObject_IsTrue(answer);
            Py_XDECREF(answer);
            if (fixed < 0) {
                Py_DECREF(value);
                return 0;
            }
        }
        loaded->baseline = fixed ? NULL : Py_NewRef(body);
    }
    loaded->value = value;
    return 1;
}

/* An entry of what was read, which takes it over; NULL with an exception set. */
static Entry *
entry_of(PyObject *key, Loaded *loaded, long long size, long long epoch)
{
    Entry *entry = entry_new(key, loaded->value, size);
    if (entry != NULL) {
        entry->epoch = epoch;
        entry->seq = loaded->seq;
        entry->version = loaded->version;
        entry->lent = 1;
        Py_SETREF(entry->stored, Py_NewRef(Py_True));
        if (loaded->baseline != NULL) {
            Py_SETREF(entry->baseline, Py_NewRef(loaded->baseline));
        }
    }
    Py_CLEAR(loaded->value);
    Py_CLEAR(loaded->baseline);
    return entry;
}

/* The value behind a record of the index, which is in the tier now; NULL where it is not that simple, maybe with an exception. */
static PyObject *
admit(State *self, PyObject *key, PyObject *record)
{
    Loaded loaded = {NULL};
    if (!load(self, record, &loaded)) {
        return NULL;
    }
    long long size = size_of_value(loaded.value);
    if (size >= 0 && loaded.baseline != NULL) {
        size += bytes_of_baseline(loaded.baseline);
    }
    Tier *tier = (Tier *)self->tier;
    if (size < 0 || size > tier->limit) {
        Py_DECREF(loaded.value);
        Py_XDECREF(loaded.baseline);
        return NULL;
    }
    PyObject *result = Py_None;
    long long needed = size + entry_bytes + 1024; /* 1024: for the key */
    long long epoch = self->epoch; /* making room may write, and so tell of what others have written since this was read */
    if (tier->usage + needed > tier->limit) {
        PyObject *number = PyLong_FromLongLong(needed < tier->limit ? needed : tier->limit);
        result = number == NULL ? NULL : PyObject_CallMethodOneArg((PyObject *)self, text__make_room, number);
        Py_XDECREF(number);
        Py_XDECREF(result);
    }
    if (result == NULL) {
        Py_DECREF(loaded.value);
        Py_XDECREF(loaded.baseline);
        return NULL;
    }
    Entry *entry = entry_of(key, &loaded, size, epoch);
    /* Whatever may run code of the user's, the collector for one, lies behind: has it written the key? */
    if (entry == NULL || self->closed || self->transaction != Py_None || tier->usage + needed > tier->limit ||
        PyDict_GET_SIZE(self->tombs) != 0 || PyDict_Contains(tier->entries, key) != 0 || tier_add(tier, entry) < 0) {
        Py_XDECREF(entry);
        return NULL;
    }
    PyObject *value = Py_NewRef(entry->value);
    Py_DECREF(entry);
    self->misses++;
    return value;
}

/* The number in an index's generation is the one given, and this chest has not committed since `n_commits` were counted. */
static int
is_unmoved(State *self, unsigned long long generation, long long n_commits)
{
    return self->view.obj != NULL && *(volatile unsigned long long *)self->view.buf == generation &&
           self->n_commits == n_commits && !self->closed && self->transaction == Py_None;
}

/* Whether a key is neither in memory nor deleted, so that what the index says of it counts. */
static int
is_elsewhere(State *self, PyObject *key)
{
    return is_dict(self->entries) && is_dict(self->tombs) && self->lent != NULL && PyDict_Check(self->lent) &&
           PyDict_Contains(self->entries, key) == 0 && PyDict_Contains(self->lent, key) == 0 &&
           PyDict_Contains(self->tombs, key) == 0;
}

/* `_pass`: (key, value) of a record that was read when the generation and the number of commits were these; the value is lent if it
   can change. None where it is not that simple. */
static PyObject *
State_pass(State *self, PyObject *const *args, Py_ssize_t n)
{
    if (n != 4) {
        PyErr_SetString(PyExc_TypeError, "_pass(key, record, n_commits, generation)");
        return NULL;
    }
    PyObject *key = args[0];
    long long n_commits = PyLong_AsLongLong(args[2]);
    unsigned long long generation = PyLong_AsUnsignedLongLong(args[3]);
    if (PyErr_Occurred()) {
        return NULL;
    }
    PyObject *lock = enter(self, key), *pair = NULL;
    if (lock == NULL) {
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    }
    Loaded loaded = {NULL};
    if (is_unmoved(self, generation, n_commits) && is_elsewhere(self, key) && load(self, args[1], &loaded)) {
        int changes = loaded.baseline != NULL;
        Py_ssize_t n_lent = PyObject_Size(self->lent);
        if (changes && n_lent > MANY_LENT) { /* they are looked at as fast as they come */
            PyObject *done = PyObject_CallMethodNoArgs((PyObject *)self, text__poll);
            Py_XDECREF(done);
        }
        PyObject *value = PyErr_Occurred() ? NULL : Py_NewRef(loaded.value);
        long long epoch = self->epoch;
        Entry *entry = value == NULL || !changes ? NULL : entry_of(key, &loaded, 0, epoch);
        /* Loading may have run code of the user's: has it written the key? */
        if (value != NULL && (entry != NULL || !changes) && is_unmoved(self, generation, n_commits) && is_elsewhere(self, key) &&
            (!changes || PyObject_SetItem(self->lent, key, (PyObject *)entry) == 0)) {
            pair = PyTuple_Pack(2, key, value);
        }
        Py_XDECREF(value);
        Py_XDECREF(entry);
        Py_XDECREF(loaded.value);
        Py_XDECREF(loaded.baseline);
    }
    if (leave(lock) < 0) {
        Py_XDECREF(pair);
        return NULL;
    }
    if (pair == NULL && (!PyErr_Occurred() || is_left_to_python())) {
        pair = Py_NewRef(Py_None);
    }
    return pair;
}

/* `_give_back`: a value that was passed on is not lent any more, if nobody holds it and it has not changed. */
static PyObject *
State_give_back(State *self, PyObject *key)
{
    if (self->lent != NULL && PyDict_Check(self->lent) && is_simple_key(key)) {
        PyObject *found = PyDict_GetItemWithError(self->lent, key); /* all of it in one step, and so without the lock */
        if (found != NULL && Py_IS_TYPE(found, &Entry_Type)) {
            Entry *entry = (Entry *)found;
            if (!entry->dirty && held_at_a_glance(entry) == 0 && picture_matches(entry->baseline, entry->value)) {
                Py_INCREF(entry); /* what it refers to is let go of when nothing is under way any more */
                int bad = PyObject_DelItem(self->lent, key);
                Py_DECREF(entry);
                if (bad < 0) {
                    return NULL;
                }
            }
        }
        else if (PyErr_Occurred()) {
            return NULL;
        }
    }
    Py_RETURN_NONE;
}

static PyObject *
State_subscript(State *self, PyObject *key)
{
    Entry *entry = current_entry(self, key);
    if (entry != NULL) {
        entry->hot = 1;
        self->hits++;
        return Py_NewRef(entry->value);
    }
    PyObject *lock = PyErr_Occurred() ? NULL : enter(self, key);
    if (lock != NULL) {
        PyObject *record = fetch(self, key);
        PyObject *value = record == NULL || record == Py_None ? NULL : admit(self, key, record);
        int absent = record == Py_None;
        Py_XDECREF(record);
        if (leave(lock) < 0) {
            Py_XDECREF(value);
            return NULL;
        }
        if (value != NULL) {
            return value;
        }
        if (absent) {
            return PyObject_CallMethodOneArg((PyObject *)self, text__absent, key);
        }
    }
    if (PyErr_Occurred() && !is_left_to_python()) {
        return NULL;
    }
    return PyObject_CallMethodOneArg((PyObject *)self, text__get_slowly, key);
}

static int
State_contains(State *self, PyObject *key)
{
    if (current_entry(self, key) != NULL) {
        return 1;
    }
    PyObject *lock = PyErr_Occurred() ? NULL : enter(self, key);
    if (lock != NULL) {
        PyObject *record = fetch(self, key);
        int found = record == NULL ? -1 : record != Py_None;
        Py_XDECREF(record);
        if (leave(lock) < 0) {
            return -1;
        }
        if (found >= 0) {
            return found;
        }
    }
    if (PyErr_Occurred() && !is_left_to_python()) {
        return -1;
    }
    PyObject *result = PyObject_CallMethodOneArg((PyObject *)self, text__contains_slowly, key);
    if (result == NULL) {
        return -1;
    }
    int found = PyObject_IsTrue(result);
    Py_DECREF(result);
    return found;
}

/* See `Spiller._new_place`. */
static unsigned long long
new_place(State *self)
{
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    unsigned long long us = (unsigned long long)now.tv_sec * 1000000 + (unsigned long long)now.tv_nsec / 1000;
    unsigned long long place = us << 12 | (unsigned long long)self->salt;
    if (place < self->next_seq) {
        place = ((self->next_seq >> 12) + 1) << 12 | (unsigned long long)self->salt;
    }
    self->next_seq = place + 1;
    return place;
}

/* Set the key of an entry, if that is simple: 1 if it is done, 0 if it is not, -1 with an exception set. */
static int
set_simply(State *self, Entry *entry)
{
    Tier *tier = (Tier *)self->tier;
    PyObject *found = PyDict_GetItemWithError(tier->entries, entry->key);
    if (found == NULL && PyErr_Occurred()) {
        return -1;
    }
    if (found != NULL && !Py_IS_TYPE(found, &Entry_Type)) {
        return 0;
    }
    Entry *old = (Entry *)found;
    if (old != NULL && !old->dirty && (old->epoch != self->epoch || self->view.obj == NULL ||
                                       *(volatile unsigned long long *)self->view.buf != self->seen)) {
        return 0; /* somebody else may have deleted it */
    }
    if (tier->usage + entry->size - (old ? old->size : 0) + entry_bytes + 1024 > tier->limit) { /* 1024: for the key */
        return 0;
    }
    entry->dirty = 1;
    entry->epoch = self->epoch;
    if (old == NULL) {
        entry->seq = new_place(self);
    }
    else {
        entry->seq = old->seq;
        entry->fresh = old->fresh;
        Py_SETREF(entry->stored, Py_NewRef(old->stored));
        Py_SETREF(entry->key, Py_NewRef(old->key)); /* the caller still has the other one */
    }
    int unsure = entry->stored == Py_None ? 1 : PyDict_Contains(self->unsure, entry->key);
    if (unsure < 0 || (unsure && PyDict_SetItem(self->unsure, entry->key, (PyObject *)entry) < 0) ||
        PyDict_SetItem(self->dirty, entry->key, (PyObject *)entry) < 0 || tier_add(tier, entry) < 0) {
        return -1;
    }
    return 1;
}

static int
State_ass_subscript(State *self, PyObject *key, PyObject *value)
{
    PyObject *result;
    if (value == NULL) {
        result = PyObject_CallMethodOneArg((PyObject *)self, text__delete_slowly, key);
        Py_XDECREF(result);
        return result == NULL ? -1 : 0;
    }
    PyObject *lock = self->write_through ? NULL : enter(self, key);
    if (lock != NULL) {
        long long size = size_of_value(value); /* which may run code of the user's, as making an entry may: first */
        Entry *entry = size < 0 ? NULL : entry_new(key, value, size);
        int done = entry == NULL ? -1 : is_simple(self) && self->failed == Py_None ? set_simply(self, entry) : 0;
        Py_XDECREF(entry);
        if (leave(lock) < 0) {
            return -1;
        }
        if (done > 0) {
            return 0;
        }
    }
    if (PyErr_Occurred() && !is_left_to_python()) {
        return -1;
    }
    PyObject *args[] = {(PyObject *)self, key, value};
    result = PyObject_VectorcallMethod(text__set_slowly, args, 3, NULL);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

static PyObject *
State_setup(PyObject *Py_UNUSED(type), PyObject *args)
{
    PyObject *nbytes, *types, *containers, *fixed;
    long long bytes;
    if (!PyArg_ParseTuple(args, "OO!O!OL:setup", &nbytes, &PySet_Type, &types, &PyDict_Type, &containers, &fixed, &bytes)) {
        return NULL;
    }
    Py_XSETREF(measure, Py_NewRef(nbytes));
    Py_XSETREF(leaves, Py_NewRef(types));
    Py_XSETREF(quick, Py_NewRef(containers));
    Py_XSETREF(is_immutable, Py_NewRef(fixed));
    entry_bytes = bytes;
    Py_RETURN_NONE;
}

static PyGetSetDef State_getset[] = {
    {"_generation", (getter)State_get_generation, (setter)State_set_generation, NULL, NULL},
    {NULL},
};

static PyMemberDef State_members[] = {
    {"lock", T_OBJECT, offsetof(State, lock), 0, NULL},
    {"_tier", T_OBJECT, offsetof(State, tier), 0, NULL},
    {"_entries", T_OBJECT, offsetof(State, entries), 0, NULL},
    {"_dirty", T_OBJECT, offsetof(State, dirty), 0, NULL},
    {"_unsure", T_OBJECT, offsetof(State, unsure), 0, NULL},
    {"_tombs", T_OBJECT, offsetof(State, tombs), 0, NULL},
    {"_lent", T_OBJECT, offsetof(State, lent), 0, NULL},
    {"_transaction", T_OBJECT, offsetof(State, transaction), 0, NULL},
    {"_store", T_OBJECT, offsetof(State, store), 0, NULL},
    {"_failed", T_OBJECT, offsetof(State, failed), 0, NULL},
    {"_seen", T_ULONGLONG, offsetof(State, seen), 0, NULL},
    {"_next_seq", T_ULONGLONG, offsetof(State, next_seq), 0, NULL},
    {"_epoch", T_LONGLONG, offsetof(State, epoch), 0, NULL},
    {"_hits", T_LONGLONG, offsetof(State, hits), 0, NULL},
    {"_misses", T_LONGLONG, offsetof(State, misses), 0, NULL},
    {"_n_commits", T_LONGLONG, offsetof(State, n_commits), 0, NULL},
    {"_salt", T_INT, offsetof(State, salt), 0, NULL},
    {"_closed", T_BOOL, offsetof(State, closed), 0, NULL},
    {"_write_through", T_BOOL, offsetof(State, write_through), 0, NULL},
    {"_plain", T_BOOL, offsetof(State, plain), 0, NULL},
    {NULL},
};

static PyMethodDef State_methods[] = {
    {"_setup", State_setup, METH_VARARGS | METH_STATIC, NULL},
    {"_pass", (PyCFunction)(void (*)(void))State_pass, METH_FASTCALL, NULL},
    {"_give_back", (PyCFunction)State_give_back, METH_O, NULL},
    {NULL},
};

static PyMappingMethods State_as_mapping = {
    .mp_subscript = (binaryfunc)State_subscript,
    .mp_ass_subscript = (objobjargproc)State_ass_subscript,
};

static PySequenceMethods State_as_sequence = {.sq_contains = (objobjproc)State_contains};

static PyTypeObject State_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "chest._native.State",
    .tp_doc = "What the quickest calls of a chest need, and these calls.",
    .tp_basicsize = sizeof(State),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .tp_new = State_new,
    .tp_dealloc = (destructor)State_dealloc,
    .tp_traverse = (traverseproc)State_traverse,
    .tp_clear = (inquiry)State_clear,
    .tp_as_mapping = &State_as_mapping,
    .tp_as_sequence = &State_as_sequence,
    .tp_members = State_members,
    .tp_getset = State_getset,
    .tp_methods = State_methods,
};

int
state_ready(PyObject *module)
{
#define INTERN(name)                                                                                                           \
    if ((text_##name = PyUnicode_InternFromString(#name)) == NULL) {                                                           \
        return -1;                                                                                                             \
    }
    TEXTS(INTERN)
#undef INTERN
    measure = Py_NewRef(Py_None);
    is_immutable = Py_NewRef(Py_None);
    leaves = PySet_New(NULL);
    quick = PyDict_New();
    if (leaves == NULL || quick == NULL || PyType_Ready(&State_Type) < 0) {
        return -1;
    }
    Py_INCREF(&State_Type);
    return PyModule_AddObject(module, "State", (PyObject *)&State_Type);
}
