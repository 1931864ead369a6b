/* Rows: what the store hands to the index, and what the index hands to LMDB, for values that come by the thousand.

   `_hot.py` has the same in Python. */

#include "tier.h"

/* The name of a key that is text or a machine's integer, as `_keys.name_of` makes it; NULL (without an exception) for others. */
PyObject *
simple_name(PyObject *key)
{
    if (PyUnicode_CheckExact(key)) {
        Py_ssize_t n;
        const char *text = PyUnicode_IS_COMPACT_ASCII(key)
                               ? (n = PyUnicode_GET_LENGTH(key), (const char *)PyUnicode_1BYTE_DATA(key))
                               : PyUnicode_AsUTF8AndSize(key, &n);
        if (text == NULL) { /* lone surrogates */
            PyErr_Clear();
            return NULL;
        }
        if (n > 510) {
            return NULL;
        }
        PyObject *name = PyBytes_FromStringAndSize(NULL, n + 1);
        if (name != NULL) {
            PyBytes_AS_STRING(name)[0] = 's';
            memcpy(PyBytes_AS_STRING(name) + 1, text, (size_t)n);
        }
        return name;
    }
    if (PyLong_CheckExact(key)) {
        int overflow;
        long long number = PyLong_AsLongLongAndOverflow(key, &overflow);
        if (!overflow && number != LLONG_MIN && !(number == -1 && PyErr_Occurred())) {
            char digits[24];
            return PyBytes_FromStringAndSize(digits, snprintf(digits, sizeof digits, "i%lld", number));
        }
    }
    return NULL;
}

/* Whether a value certainly cannot change: text, bytes, numbers, None, and tuples of them. (`is_immutable` knows more.) */
static int
is_fixed_to(PyObject *value, int depth)
{
    PyTypeObject *type = Py_TYPE(value);
    if (type == &PyTuple_Type && depth > 0 && PyTuple_GET_SIZE(value) <= 64) {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); i++) {
            if (!is_fixed_to(PyTuple_GET_ITEM(value, i), depth - 1)) {
                return 0;
            }
        }
        return 1;
    }
    return type == &PyUnicode_Type || type == &PyBytes_Type || type == &PyLong_Type || type == &PyFloat_Type ||
           type == &PyBool_Type || value == Py_None;
}

int
is_fixed(PyObject *value)
{
    return is_fixed_to(value, 4);
}

/* Whether a value certainly can change. */
int
is_container(PyObject *value)
{
    return PyDict_CheckExact(value) || PyList_CheckExact(value) || PySet_CheckExact(value) || PyByteArray_CheckExact(value);
}

static PyObject *
pack_rows(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *items, *dumps, *dumps_plain, *fixed, *hash, *rows, *done, *baselines;
    long long limit, small, budget, size = 0;
    if (!PyArg_ParseTuple(args, "OOOOOLLLO!O!O!:pack_rows", &items, &dumps, &dumps_plain, &fixed, &hash, &limit, &small, &budget, &PyList_Type,
                          &done, &PyList_Type, &rows, &PyList_Type, &baselines)) {
        return NULL;
    }
    PyObject *item = NULL, *empty = PyBytes_FromStringAndSize(NULL, 0), *zero = PyLong_FromLong(0);
    while (empty != NULL && zero != NULL && size < budget && (item = PyIter_Next(items)) != NULL) {
        if (!Py_IS_TYPE(item, &Entry_Type) || ((Entry *)item)->size >= limit) {
            break;
        }
        Entry *entry = (Entry *)item;
        PyObject *name = simple_name(entry->key);
        if (name == NULL) {
            break;
        }
        int atomic = is_fixed(entry->value), glance = atomic ? 0 : held_at_a_glance(entry);
        if (entry->dirty && !atomic) {
            /* Asked before it is serialized: what nobody holds cannot differ from what is written, unless it is handed out. */
            int held = glance < 0 ? holders_of(entry) : glance;
            if (held == 0 && PyType_SUPPORTS_WEAKREFS(Py_TYPE(entry->value)) &&
                *PyObject_GET_WEAKREFS_LISTPTR(entry->value) != NULL) {
                held = 1; /* who has a weak reference may come back */
            }
            if (held < 0) {
                Py_DECREF(name);
                if (PyErr_ExceptionMatches(PyExc_Exception)) {
                    PyErr_Clear(); /* as below */
                }
                break;
            }
            entry->lent = held != 0;
        }
        PyObject *value = Py_NewRef(entry->value);
        PyObject *body = PyObject_CallOneArg(glance == 0 ? dumps_plain : dumps, value); /* 0: all of it is plain */
        PyObject *baseline = NULL;
        if (body != NULL && PyBytes_CheckExact(body) && PyBytes_GET_SIZE(body) < small) {
            if (atomic) {
                baseline = Py_NewRef(Py_None);
            }
            else {
                int yes = 0;
                if (!is_container(value)) {
                    PyObject *answer = PyObject_CallOneArg(fixed, value);
                    yes = answer == NULL ? -1 : PyObject_IsTrue(answer);
                    Py_XDECREF(answer);
                }
                baseline = yes < 0 ? NULL : yes ? Py_NewRef(Py_None) : PyObject_CallOneArg(hash, body);
            }
        }
        PyObject *seq = baseline == NULL ? NULL : PyLong_FromUnsignedLongLong(entry->seq);
        PyObject *row = seq == NULL ? NULL : PyTuple_Pack(6, name, seq, zero, body, empty, entry->fresh ? Py_True : Py_False);
        int bad = row == NULL;
        if (!bad) {
            PyObject_GC_UnTrack(row); /* no part of it can refer to anything */
            bad = PyList_Append(done, item) < 0 || PyList_Append(rows, row) < 0 || PyList_Append(baselines, baseline) < 0;
            size += PyBytes_GET_SIZE(body);
        }
        Py_XDECREF(row);
        Py_XDECREF(seq);
        Py_XDECREF(baseline);
        Py_XDECREF(body);
        Py_DECREF(value);
        Py_DECREF(name);
        if (bad) {
            if (row == NULL && PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_Exception)) {
                PyErr_Clear(); /* it is tried again, in Python, by those who can say what is wrong with it */
            }
            break;
        }
        Py_CLEAR(item);
    }
    Py_XDECREF(empty);
    Py_XDECREF(zero);
    if (PyErr_Occurred()) {
        Py_XDECREF(item);
        return NULL;
    }
    return Py_BuildValue("NL", item == NULL ? Py_NewRef(Py_None) : item, size);
}

/* --- what LMDB is given: an iterator over (key, data) pairs, made one by one while LMDB takes them */

typedef struct {
    PyObject_HEAD
    PyObject *rows, *places, *digest;
    unsigned long long version;
    Py_ssize_t at;
    int is_order;
} Pairs;

static void
put_number(char *to, unsigned long long number, int big_endian)
{
    for (int i = 0; i < 8; i++) {
        to[big_endian ? 7 - i : i] = (char)(number >> (8 * i));
    }
}

/* (key, data + checksum of both), where data is what `fill` bytes of head and two parts make. */
static PyObject *
sealed(PyObject *digest, PyObject *key, const char *head, Py_ssize_t n_head, PyObject *first, PyObject *second)
{
    Py_ssize_t n_key = PyBytes_GET_SIZE(key), n_first = PyBytes_GET_SIZE(first);
    Py_ssize_t n_second = second == NULL ? 0 : PyBytes_GET_SIZE(second), n_data = n_head + n_first + n_second;
    PyObject *whole = PyBytes_FromStringAndSize(NULL, n_key + n_data), *pair = NULL;
    if (whole == NULL) {
        return NULL;
    }
    char *at = PyBytes_AS_STRING(whole);
    memcpy(at, PyBytes_AS_STRING(key), (size_t)n_key);
    memcpy(at + n_key, head, (size_t)n_head);
    memcpy(at + n_key + n_head, PyBytes_AS_STRING(first), (size_t)n_first);
    if (second != NULL) {
        memcpy(at + n_key + n_head + n_first, PyBytes_AS_STRING(second), (size_t)n_second);
    }
    PyObject *sum = PyObject_CallOneArg(digest, whole);
    PyObject *data = sum == NULL || !PyBytes_Check(sum) || PyBytes_GET_SIZE(sum) != 8
                         ? NULL
                         : PyBytes_FromStringAndSize(NULL, n_data + 8);
    if (data != NULL) {
        memcpy(PyBytes_AS_STRING(data), at + n_key, (size_t)n_data);
        memcpy(PyBytes_AS_STRING(data) + n_data, PyBytes_AS_STRING(sum), 8);
        pair = PyTuple_Pack(2, key, data);
        Py_DECREF(data);
    }
    Py_XDECREF(sum);
    Py_DECREF(whole);
    return pair;
}

static PyObject *
Pairs_next(Pairs *self)
{
    if (self->at >= PyList_GET_SIZE(self->rows)) {
        return NULL;
    }
    PyObject *row = PyList_GET_ITEM(self->rows, self->at);
    PyObject *pair = NULL;
    if (!PyTuple_Check(row) || PyTuple_GET_SIZE(row) != 6 || !PyBytes_Check(PyTuple_GET_ITEM(row, 0)) ||
        !PyBytes_Check(PyTuple_GET_ITEM(row, 3)) || !PyBytes_Check(PyTuple_GET_ITEM(row, 4))) {
        PyErr_SetString(PyExc_TypeError, "a row is (name, seq, kind, body, typed, fresh)");
        return NULL;
    }
    PyObject *name = PyTuple_GET_ITEM(row, 0), *body = PyTuple_GET_ITEM(row, 3), *typed = PyTuple_GET_ITEM(row, 4);
    PyObject *number = self->is_order ? PyList_GetItem(self->places, self->at) : PyDict_GetItemWithError(self->places, name);
    if (number == NULL) {
        if (!PyErr_Occurred()) {
            PyErr_SetObject(PyExc_KeyError, name);
        }
        return NULL;
    }
    unsigned long long seq = PyLong_AsUnsignedLongLong(number);
    if (seq == (unsigned long long)-1 && PyErr_Occurred()) {
        return NULL;
    }
    if (self->is_order) {
        Py_ssize_t n = PyBytes_GET_SIZE(name);
        char head[2] = {(char)(n & 255), (char)(n >> 8)};
        PyObject *place = PyBytes_FromStringAndSize(NULL, 8);
        if (place == NULL) {
            return NULL;
        }
        put_number(PyBytes_AS_STRING(place), seq, 1);
        pair = sealed(self->digest, place, head, 2, name, typed);
        Py_DECREF(place);
    }
    else {
        long kind = PyLong_AsLong(PyTuple_GET_ITEM(row, 2));
        if (kind < 0 || kind > 255) {
            if (!PyErr_Occurred()) {
                PyErr_SetString(PyExc_ValueError, "a kind is 0 to 255");
            }
            return NULL;
        }
        char head[17];
        put_number(head, self->version, 0);
        put_number(head + 8, seq, 0);
        head[16] = (char)kind;
        pair = sealed(self->digest, name, head, 17, body, NULL);
    }
    self->at++;
    return pair;
}

static void
Pairs_dealloc(Pairs *self)
{
    Py_XDECREF(self->rows);
    Py_XDECREF(self->places);
    Py_XDECREF(self->digest);
    PyObject_Free(self);
}

static PyTypeObject Pairs_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "chest._native.Pairs",
    .tp_basicsize = sizeof(Pairs),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_dealloc = (destructor)Pairs_dealloc,
    .tp_iter = PyObject_SelfIter,
    .tp_iternext = (iternextfunc)Pairs_next,
};

static PyObject *
new_pairs(PyObject *rows, PyObject *places, PyObject *digest, unsigned long long version, int is_order)
{
    Pairs *self = PyObject_New(Pairs, &Pairs_Type);
    if (self != NULL) {
        self->rows = Py_NewRef(rows);
        self->places = Py_NewRef(places);
        self->digest = Py_NewRef(digest);
        self->version = version;
        self->is_order = is_order;
        self->at = 0;
    }
    return (PyObject *)self;
}

static PyObject *
record_pairs(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *rows, *seqs, *digest;
    unsigned long long version;
    if (!PyArg_ParseTuple(args, "KO!O!O:record_pairs", &version, &PyDict_Type, &seqs, &PyList_Type, &rows, &digest)) {
        return NULL;
    }
    return new_pairs(rows, seqs, digest, version, 0);
}

static PyObject *
order_pairs(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *rows, *places, *digest;
    if (!PyArg_ParseTuple(args, "O!O!O:order_pairs", &PyList_Type, &rows, &PyList_Type, &places, &digest)) {
        return NULL;
    }
    return new_pairs(rows, places, digest, 0, 1);
}

/* --- and what it gives back */

/* The checksum at the end of what lies under a key: 1 if it is right, 0 if not, -1 with an exception set. */
static int
is_sealed(PyObject *digest, PyObject *key, PyObject *data)
{
    Py_ssize_t n_key = PyBytes_GET_SIZE(key), n_data = PyBytes_GET_SIZE(data) - 8;
    if (n_data < 0) {
        return 0;
    }
    PyObject *whole = PyBytes_FromStringAndSize(NULL, n_key + n_data);
    if (whole == NULL) {
        return -1;
    }
    memcpy(PyBytes_AS_STRING(whole), PyBytes_AS_STRING(key), (size_t)n_key);
    memcpy(PyBytes_AS_STRING(whole) + n_key, PyBytes_AS_STRING(data), (size_t)n_data);
    PyObject *sum = PyObject_CallOneArg(digest, whole);
    Py_DECREF(whole);
    if (sum == NULL) {
        return -1;
    }
    int same = PyBytes_Check(sum) && PyBytes_GET_SIZE(sum) == 8 &&
               !memcmp(PyBytes_AS_STRING(sum), PyBytes_AS_STRING(data) + n_data, 8);
    Py_DECREF(sum);
    return same;
}

static unsigned long long
get_number(const char *from, int big_endian)
{
    unsigned long long number = 0;
    for (int i = 0; i < 8; i++) {
        number = number << 8 | (unsigned char)from[big_endian ? i : 7 - i];
    }
    return number;
}

/* A pair of bytes, as LMDB gives them; 0 with an exception set where it is none. */
static int
is_pair(PyObject *pair)
{
    if (PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2 && PyBytes_Check(PyTuple_GET_ITEM(pair, 0)) &&
        PyBytes_Check(PyTuple_GET_ITEM(pair, 1))) {
        return 1;
    }
    PyErr_SetString(PyExc_TypeError, "a pair of bytes is needed");
    return 0;
}

/* A named tuple of these, which it takes over; nothing in it can refer to anything. */
static PyObject *
new_tuple(PyTypeObject *type, PyObject **fields, Py_ssize_t n)
{
    PyObject *tuple = type->tp_alloc(type, n);
    int bad = tuple == NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        bad = bad || fields[i] == NULL;
        if (tuple != NULL) {
            PyTuple_SET_ITEM(tuple, i, fields[i]);
        }
        else {
            Py_XDECREF(fields[i]);
        }
    }
    if (bad) {
        Py_XDECREF(tuple);
        return NULL;
    }
    PyObject_GC_UnTrack(tuple);
    return tuple;
}

/* The record that lies under a name, None if it is not what was written; NULL with an exception set. */
static PyObject *
record_of(PyTypeObject *type, PyObject *name, PyObject *data, PyObject *digest)
{
    Py_ssize_t n_data = PyBytes_GET_SIZE(data) - 8;
    const char *bytes = PyBytes_AS_STRING(data);
    int whole = n_data < 17 ? 0 : is_sealed(digest, name, data);
    if (whole <= 0) {
        return whole < 0 ? NULL : Py_NewRef(Py_None);
    }
    PyObject *fields[] = {PyLong_FromUnsignedLongLong(get_number(bytes, 0)), PyLong_FromUnsignedLongLong(get_number(bytes + 8, 0)),
                          PyLong_FromLong((unsigned char)bytes[16]), PyBytes_FromStringAndSize(bytes + 17, n_data - 17)};
    return new_tuple(type, fields, 4);
}

static PyObject *
read_record(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n)
{
    if (n != 4 || !PyType_Check(args[0]) || !PyBytes_Check(args[1]) || !PyBytes_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "read_record(type, name, data, digest)");
        return NULL;
    }
    return record_of((PyTypeObject *)args[0], args[1], args[2], args[3]);
}

static PyObject *
read_records(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *pairs, *digest;
    PyTypeObject *type;
    if (!PyArg_ParseTuple(args, "O!O!O:read_records", &PyType_Type, &type, &PyList_Type, &pairs, &digest)) {
        return NULL;
    }
    PyObject *records = PyList_New(0);
    for (Py_ssize_t i = 0; records != NULL && i < PyList_GET_SIZE(pairs); i++) {
        PyObject *pair = Py_NewRef(PyList_GET_ITEM(pairs, i)), *record = NULL;
        if (is_pair(pair)) {
            record = record_of(type, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1), digest);
        }
        if (record == Py_None) {
            Py_SETREF(records, Py_NewRef(PyTuple_GET_ITEM(pair, 0)));
            Py_DECREF(record);
            Py_DECREF(pair);
            return records;
        }
        if (record == NULL || PyList_Append(records, record) < 0) {
            Py_CLEAR(records);
        }
        Py_XDECREF(record);
        Py_DECREF(pair);
    }
    return records;
}

static PyObject *text_abort, *text_begin, *text_get, *text_index, *text_shut;

/* Look up a name as `Environment.read` does: inside of the gate, in a transaction of its own. NotImplemented where the gate is
   shut, or LMDB has something to say: then it is for Python to wait, or to translate. */
static PyObject *
look_up(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n)
{
    if (n != 6 || !PyType_Check(args[0]) || !PyList_CheckExact(args[3]) || !PyBytes_Check(args[5])) {
        PyErr_SetString(PyExc_TypeError, "look_up(type, environment, digest, inside, gate, name)");
        return NULL;
    }
    PyObject *inside = args[3], *name = args[5], *data = NULL;
    PyObject *ident = PyLong_FromUnsignedLong(PyThread_get_thread_ident());
    if (ident == NULL || PyList_Append(inside, ident) < 0) {
        Py_XDECREF(ident);
        return NULL;
    }
    PyObject *shut = PyObject_GetAttr(args[4], text_shut);
    if (shut == Py_False) {
        PyObject *begin = PyObject_GetAttr(args[1], text_begin);
        PyObject *database = begin == NULL ? NULL : PyObject_GetAttr(args[1], text_index);
        PyObject *transaction = database == NULL ? NULL : PyObject_CallOneArg(begin, database);
        Py_XDECREF(begin);
        Py_XDECREF(database);
        if (transaction != NULL) {
            data = PyObject_CallMethodOneArg(transaction, text_get, name);
            PyObject *type, *error, *traceback;
            PyErr_Fetch(&type, &error, &traceback);
            PyObject *ended = PyObject_CallMethodNoArgs(transaction, text_abort);
            if (ended == NULL) {
                PyErr_Clear();
            }
            Py_XDECREF(ended);
            Py_DECREF(transaction);
            PyErr_Restore(type, error, traceback);
        }
    }
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    for (Py_ssize_t i = PyList_GET_SIZE(inside) - 1; i >= 0; i--) { /* its own, or another one of this thread: they are alike */
        PyObject *other = PyList_GET_ITEM(inside, i);
        if (other == ident || PyObject_RichCompareBool(other, ident, Py_EQ) > 0) {
            PyList_SetSlice(inside, i, i + 1, NULL);
            break;
        }
    }
    Py_DECREF(ident);
    PyErr_Restore(type, error, traceback);
    Py_XDECREF(shut);
    PyObject *record = data;
    if (data == NULL) {
        if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) {
            return NULL;
        }
        PyErr_Clear();
        return Py_NewRef(Py_NotImplemented);
    }
    if (data != Py_None) {
        record = PyBytes_Check(data) ? record_of((PyTypeObject *)args[0], name, data, args[2]) : Py_NewRef(Py_None);
        Py_DECREF(data);
        if (record == Py_None) { /* damaged: Python says so */
            Py_SETREF(record, Py_NewRef(Py_NotImplemented));
        }
    }
    return record;
}

static PyObject *
read_order(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *pairs, *digest;
    PyTypeObject *type;
    if (!PyArg_ParseTuple(args, "O!O!O:read_order", &PyType_Type, &type, &PyList_Type, &pairs, &digest)) {
        return NULL;
    }
    PyObject *items = PyList_New(0);
    for (Py_ssize_t i = 0; items != NULL && i < PyList_GET_SIZE(pairs); i++) {
        PyObject *pair = PyList_GET_ITEM(pairs, i);
        if (!is_pair(pair)) {
            Py_DECREF(items);
            return NULL;
        }
        PyObject *place = PyTuple_GET_ITEM(pair, 0), *data = PyTuple_GET_ITEM(pair, 1);
        const char *bytes = PyBytes_AS_STRING(data);
        Py_ssize_t n_data = PyBytes_GET_SIZE(data) - 8, end = 2;
        int whole = PyBytes_GET_SIZE(place) != 8 || n_data < 2 ? 0 : is_sealed(digest, place, data);
        if (whole > 0) {
            end += (unsigned char)bytes[0] + ((unsigned char)bytes[1] << 8);
            whole = end <= n_data;
        }
        if (whole <= 0) {
            Py_DECREF(items);
            return whole < 0 ? NULL : Py_NewRef(place);
        }
        PyObject *fields[] = {PyLong_FromUnsignedLongLong(get_number(PyBytes_AS_STRING(place), 1)),
                              PyBytes_FromStringAndSize(bytes + 2, end - 2),
                              PyBytes_FromStringAndSize(bytes + end, n_data - end)};
        PyObject *item = new_tuple(type, fields, 3);
        if (item == NULL || PyList_Append(items, item) < 0) {
            Py_CLEAR(items);
        }
        Py_XDECREF(item);
    }
    return items;
}

static PyObject *
read_places(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *pairs, *digest;
    if (!PyArg_ParseTuple(args, "O!O:read_places", &PyList_Type, &pairs, &digest)) {
        return NULL;
    }
    PyObject *seqs = PyDict_New(), *noted = PyList_New(0), *lost = PyList_New(0);
    int bad = seqs == NULL || noted == NULL || lost == NULL;
    for (Py_ssize_t i = 0; !bad && i < PyList_GET_SIZE(pairs); i++) {
        PyObject *pair = PyList_GET_ITEM(pairs, i);
        if (!is_pair(pair)) {
            bad = 1;
            break;
        }
        PyObject *name = PyTuple_GET_ITEM(pair, 0), *data = PyTuple_GET_ITEM(pair, 1);
        int whole = PyBytes_GET_SIZE(data) < 25 ? 0 : is_sealed(digest, name, data);
        if (whole <= 0) {
            bad = whole < 0 || PyList_Append(lost, name) < 0;
            continue;
        }
        PyObject *seq = PyLong_FromUnsignedLongLong(get_number(PyBytes_AS_STRING(data) + 8, 0));
        bad = seq == NULL || PyDict_SetItem(seqs, name, seq) < 0 ||
              (PyBytes_AS_STRING(data)[16] & 3 && PyList_Append(noted, pair) < 0);
        Py_XDECREF(seq);
    }
    if (bad) {
        Py_XDECREF(seqs);
        Py_XDECREF(noted);
        Py_XDECREF(lost);
        return NULL;
    }
    return Py_BuildValue("NNN", seqs, noted, lost);
}

static PyObject *
read_key(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n)
{
    if (n != 3 || !PyBytes_Check(args[0]) || !PyBytes_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "read_key(name, typed, decode)");
        return NULL;
    }
    Py_ssize_t size = PyBytes_GET_SIZE(args[0]);
    const char *name = PyBytes_AS_STRING(args[0]);
    if (PyBytes_GET_SIZE(args[1]) == 0 && size > 0 && name[0] == 's') {
        PyObject *key = PyUnicode_DecodeUTF8(name + 1, size - 1, NULL);
        if (key != NULL || !PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) {
            return key;
        }
        PyErr_Clear(); /* lone surrogates */
    }
    return PyObject_CallFunctionObjArgs(args[2], args[0], args[1], NULL);
}

static PyObject *
settle_rows(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *done, *baselines, *dirty, *unsure;
    unsigned long long version;
    long long epoch, n_new = 0;
    if (!PyArg_ParseTuple(args, "O!O!O!O!KL:settle_rows", &PyList_Type, &done, &PyList_Type, &baselines, &PyDict_Type, &dirty,
                          &PyDict_Type, &unsure, &version, &epoch)) {
        return NULL;
    }
    PyObject *stuck = PyList_New(0);
    for (Py_ssize_t i = 0; stuck != NULL && i < PyList_GET_SIZE(done) && i < PyList_GET_SIZE(baselines); i++) {
        Entry *entry = (Entry *)PyList_GET_ITEM(done, i);
        if (!Py_IS_TYPE(entry, &Entry_Type)) {
            PyErr_SetString(PyExc_TypeError, "a list of entries is needed");
            Py_CLEAR(stuck);
            break;
        }
        Py_INCREF(entry);
        int found = PyDict_Contains(unsure, entry->key);
        if (found > 0) {
            found = PyDict_DelItem(unsure, entry->key);
        }
        else if (found == 0 && entry->stored != Py_True) {
            n_new++;
        }
        Entry *newer = found < 0 ? NULL : (Entry *)PyDict_GetItemWithError(dirty, entry->key);
        if (newer == entry) {
            found = PyDict_DelItem(dirty, entry->key);
        }
        else if (newer != NULL && Py_IS_TYPE(newer, &Entry_Type)) {
            Py_SETREF(newer->stored, Py_NewRef(Py_True));
            newer->fresh = 0;
        }
        else if (PyErr_Occurred()) {
            found = -1;
        }
        entry->version = version;
        Py_SETREF(entry->baseline, Py_NewRef(PyList_GET_ITEM(baselines, i)));
        entry->epoch = epoch;
        Py_SETREF(entry->stored, Py_NewRef(Py_True));
        entry->fresh = 0;
        entry->lent = entry->lent && entry->baseline != Py_None;
        if (entry->round) {
            found = found < 0 ? -1 : PyList_Append(stuck, (PyObject *)entry);
        }
        else {
            entry->dirty = 0;
        }
        Py_DECREF(entry);
        if (found < 0) {
            Py_CLEAR(stuck);
        }
    }
    return stuck == NULL ? NULL : Py_BuildValue("LN", n_new, stuck);
}

static PyMethodDef functions[] = {
    {"pack_rows", pack_rows, METH_VARARGS, NULL},
    {"record_pairs", record_pairs, METH_VARARGS, NULL},
    {"order_pairs", order_pairs, METH_VARARGS, NULL},
    {"read_record", (PyCFunction)(void (*)(void))read_record, METH_FASTCALL, NULL},
    {"read_records", read_records, METH_VARARGS, NULL},
    {"look_up", (PyCFunction)(void (*)(void))look_up, METH_FASTCALL, NULL},
    {"read_key", (PyCFunction)(void (*)(void))read_key, METH_FASTCALL, NULL},
    {"read_order", read_order, METH_VARARGS, NULL},
    {"read_places", read_places, METH_VARARGS, NULL},
    {"settle_rows", settle_rows, METH_VARARGS, NULL},
    {NULL},
};

int
rows_ready(PyObject *module)
{
    text_abort = PyUnicode_InternFromString("abort");
    text_begin = PyUnicode_InternFromString("begin");
    text_get = PyUnicode_InternFromString("get");
    text_index = PyUnicode_InternFromString("index");
    text_shut = PyUnicode_InternFromString("shut");
    if (text_abort == NULL || text_begin == NULL || text_get == NULL || text_index == NULL || text_shut == NULL) {
        return -1;
    }
    return PyType_Ready(&Pairs_Type) < 0 || PyModule_AddFunctions(module, functions) < 0 ? -1 : 0;
}
