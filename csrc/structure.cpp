#include "structure.h"

#include <array>

namespace py = pybind11;

namespace focalnet {

namespace {

// Deeper than any real network. The limit ends the recursion if a module contains itself.
constexpr int kMaxDepth = 64;

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// Interned attribute names, so that names can be compared by identity.
struct Names {
    PyObject* parameters = interned("_parameters");
    PyObject* modules = interned("_modules");
    PyObject* forward = interned("forward");
    PyObject* keywords = interned("keywords");
    std::array<PyObject*, 5> must_be_empty = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                              interned("_backward_hooks"), interned("_backward_pre_hooks"),
                                              interned("_buffers")};
    // Attributes of a tensor that decide whether a kernel can read it.
    std::array<PyObject*, 3> facts = {interned("dtype"), interned("layout"), interned("device")};
};

const Names& names() {
    static const Names names;
    return names;
}

template <size_t N>
bool contains(const std::array<PyObject*, N>& names, PyObject* name) {
    for (PyObject* candidate : names) {
        if (candidate == name) {
            return true;
        }
    }
    return false;
}

bool is_plain(PyObject* value);

bool are_plain(PyObject* dictionary) {
    PyObject *key, *value;
    for (Py_ssize_t i = 0; PyDict_Next(dictionary, &i, &key, &value);) {
        if (!is_plain(value)) {
            return false;
        }
    }
    return true;
}

// Whether `value` is immutable and refers only to other plain values.
bool is_plain(PyObject* value) {
    if (PyTuple_CheckExact(value)) {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
            if (!is_plain(PyTuple_GET_ITEM(value, i))) {
                return false;
            }
        }
        return true;
    }
    // A builtin function, such as an activation. A bound builtin method refers to its object and is not plain.
    if (PyCFunction_CheckExact(value)) {
        PyObject* self = PyCFunction_GET_SELF(value);
        return self == nullptr || PyModule_Check(self) || PyType_Check(self);
    }
    return value == Py_None || PyBool_Check(value) || PyLong_CheckExact(value) || PyFloat_CheckExact(value) ||
           PyUnicode_CheckExact(value);
}

// Whether `value` equals `recorded`, which is plain. `value` may be any object.
bool is_equal(PyObject* value, PyObject* recorded) {
    if (value == recorded) {
        return true;
    }
    return Py_TYPE(value) == Py_TYPE(recorded) && is_plain(value) &&
           PyObject_RichCompareBool(value, recorded, Py_EQ) == 1;
}

bool is_equal_name(PyObject* name, const py::object& recorded) {
    return name == recorded.ptr() || PyUnicode_Compare(name, recorded.ptr()) == 0;
}

PyObject* type_of(PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)); }

// The attribute dictionary of a module, or a null object if `module` has none.
py::object dictionary_of(PyObject* module) {
    PyObject* dictionary = PyObject_GenericGetDict(module, nullptr);
    if (dictionary == nullptr) {
        PyErr_Clear();
    }
    return py::reinterpret_steal<py::object>(dictionary);
}

py::object attribute_of(PyObject* object, PyObject* name) {
    PyObject* attribute = PyObject_GetAttr(object, name);
    if (attribute == nullptr) {
        PyErr_Clear();
    }
    return py::reinterpret_steal<py::object>(attribute);
}

bool has_keywords(PyObject* forward, PyObject* recorded) {
    const py::object keywords = attribute_of(forward, names().keywords);
    return keywords && PyDict_Check(keywords.ptr()) && are_plain(keywords.ptr()) &&
           PyObject_RichCompareBool(keywords.ptr(), recorded, Py_EQ) == 1;
}

}  // namespace

Structure::Structure(py::handle module) { record_module(Py_None, module.ptr()); }

// ---- recording -------------------------------------------------------------------------------------------

void Structure::record(Kind kind, PyObject* name, PyObject* value, Py_ssize_t size) {
    entries_.push_back(
        {kind, py::reinterpret_borrow<py::object>(name), py::reinterpret_borrow<py::object>(value), size});
}

void Structure::record_module(PyObject* name, PyObject* module) {
    if (module == Py_None) {
        return record(Kind::value, name, Py_None);
    }
    const py::object dictionary = dictionary_of(module);
    if (!dictionary || depth_ == kMaxDepth) {
        is_complete_ = false;
        return;
    }
    ++depth_;
    record(Kind::type, name, type_of(module), PyDict_GET_SIZE(dictionary.ptr()));
    note_object(module);
    note_dictionary(dictionary.ptr());
    PyObject *key, *value;
    for (Py_ssize_t i = 0; PyDict_Next(dictionary.ptr(), &i, &key, &value);) {
        record_attribute(key, value);
    }
    --depth_;
}

void Structure::record_attribute(PyObject* name, PyObject* value) {
    PyObject *key, *item;
    if (name == names().forward) {
        record(Kind::type, name, type_of(value));
        const py::object keywords = attribute_of(value, names().keywords);
        is_complete_ = is_complete_ && keywords && PyDict_Check(keywords.ptr()) && are_plain(keywords.ptr());
        return record(Kind::keywords, name, keywords ? keywords.ptr() : Py_None);
    }
    if (!PyDict_Check(value)) {
        return is_plain(value) ? record(Kind::value, name, value) : record(Kind::type, name, type_of(value));
    }
    if (contains(names().must_be_empty, name)) {
        note_object(value);
        return record(Kind::is_empty, name, Py_None, PyDict_GET_SIZE(value));
    }
    if (name != names().parameters && name != names().modules) {
        return record(Kind::ignored, name, Py_None);  // state_dict hooks
    }
    note_dictionary(value);
    record(name == names().parameters ? Kind::parameters : Kind::modules, name, Py_None, PyDict_GET_SIZE(value));
    for (Py_ssize_t i = 0; PyDict_Next(value, &i, &key, &item);) {
        name == names().parameters ? record_parameter(key, item) : record_module(key, item);
    }
}

void Structure::record_parameter(PyObject* name, PyObject* tensor) {
    record(Kind::type, name, type_of(tensor));
    if (tensor == Py_None) {
        return;
    }
    note_object(tensor);
    for (PyObject* fact_name : names().facts) {
        const py::object fact = attribute_of(tensor, fact_name);
        is_complete_ = is_complete_ && fact;
        record(Kind::value, fact_name, fact ? fact.ptr() : Py_None);
    }
}

// ---- cache lines -----------------------------------------------------------------------------------------

void Structure::note(const void* address, size_t bytes) {
    const auto* first = static_cast<const char*>(address);
    for (size_t offset = 0; offset < bytes; offset += 64) {
        cache_lines_.push_back(first + offset);
    }
}

void Structure::note_object(const PyObject* object) { note(object, sizeof(PyDictObject)); }

void Structure::note_dictionary(PyObject* dictionary) {
    note_object(dictionary);
    // The items lie outside the object. If instances of the class share their keys, there is only an array of values.
    // Otherwise there is an index of one byte per slot, followed by a table of keys and values.
    const auto* fields = reinterpret_cast<PyDictObject*>(dictionary);
    const size_t items = static_cast<size_t>(fields->ma_used);
    if (fields->ma_values != nullptr) {
        note(fields->ma_values, items * sizeof(PyObject*));
    } else if (items > 0) {
        note(fields->ma_keys, 32 + 2 * items + items * 2 * sizeof(PyObject*));
    }
}

// ---- comparing -------------------------------------------------------------------------------------------

py::object Structure::parameters_of(py::handle module) const {
    if (!is_complete_) {
        return py::none();
    }
    for (const char* line : cache_lines_) {
        __builtin_prefetch(line);
    }
    py::list found;
    Cursor next = entries_.begin();
    const bool is_same = matches_module(next, Py_None, module.ptr(), found.ptr());
    return is_same ? py::object(std::move(found)) : py::none();
}

bool Structure::matches_module(Cursor& next, PyObject* name, PyObject* module, PyObject* found) {
    const Entry& entry = *next++;
    if (!is_equal_name(name, entry.name)) {
        return false;
    }
    if (entry.kind == Kind::value) {
        return module == Py_None;
    }
    if (type_of(module) != entry.value.ptr()) {
        return false;
    }
    const py::object dictionary = dictionary_of(module);
    if (!dictionary || PyDict_GET_SIZE(dictionary.ptr()) != entry.size) {
        return false;
    }
    PyObject *key, *value;
    for (Py_ssize_t i = 0; PyDict_Next(dictionary.ptr(), &i, &key, &value);) {
        if (!matches_attribute(next, key, value, found)) {
            return false;
        }
    }
    return true;
}

bool Structure::matches_attribute(Cursor& next, PyObject* name, PyObject* value, PyObject* found) {
    const Entry& entry = *next++;
    if (!is_equal_name(name, entry.name)) {
        return false;
    }
    switch (entry.kind) {
        case Kind::value:
            return is_equal(value, entry.value.ptr());
        case Kind::type:
            return type_of(value) == entry.value.ptr() &&
                   (name != names().forward || has_keywords(value, (next++)->value.ptr()));
        case Kind::ignored:
            return true;
        case Kind::keywords:  // already compared, together with `forward`
            return false;
        case Kind::is_empty:
            return PyDict_Check(value) && PyDict_GET_SIZE(value) == entry.size;
        case Kind::parameters:
        case Kind::modules:
            break;
    }
    if (!PyDict_Check(value) || PyDict_GET_SIZE(value) != entry.size) {
        return false;
    }
    PyObject *key, *item;
    const auto matches = entry.kind == Kind::parameters ? matches_parameter : matches_module;
    for (Py_ssize_t i = 0; PyDict_Next(value, &i, &key, &item);) {
        if (!matches(next, key, item, found)) {
            return false;
        }
    }
    return true;
}

bool Structure::matches_parameter(Cursor& next, PyObject* name, PyObject* tensor, PyObject* found) {
    const Entry& entry = *next++;
    if (!is_equal_name(name, entry.name) || type_of(tensor) != entry.value.ptr()) {
        return false;
    }
    if (tensor != Py_None) {
        for (size_t i = 0; i < names().facts.size(); ++i) {
            const Entry& fact = *next++;
            const py::object now = attribute_of(tensor, fact.name.ptr());
            // Identity is not enough: every access to `device` creates a new torch.device.
            if (!now || PyObject_RichCompareBool(now.ptr(), fact.value.ptr(), Py_EQ) != 1) {
                return false;
            }
        }
    }
    return PyList_Append(found, tensor) == 0;
}

}  // namespace focalnet
