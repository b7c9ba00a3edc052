// Package identity holds the words for WHO: a stable name (an [ID], a SPIFFE ID), the document that proves it (an
// [X509SVID] or [JWTSVID]), the keys that verify such documents (a [Bundle]), and the living statements beside it
// ([Fact], [FactSet]). The ID names; the facts describe. It does no I/O.
//
// Trust: everything here may be parsed from an attacker's bytes; parsers are strict and fuzzed.
//
// Source: SPIFFE-ID, X509-SVID, JWT-SVID and SPIFFE Trust Domain and Bundle, all version 1.0.
package identity
