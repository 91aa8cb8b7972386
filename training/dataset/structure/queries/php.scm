(namespace_use_declaration (namespace_use_clause [(qualified_name) (name)] @use))
(namespace_use_declaration (namespace_name) @use
  body: (namespace_use_group (namespace_use_clause [(qualified_name) (namespace_name) (name)] @name)))
(require_expression (_) @require)
(require_once_expression (_) @require)
(include_expression (_) @require)
(include_once_expression (_) @require)
(namespace_definition name: (_) @package)

(program [(class_declaration name: (_) @define) (interface_declaration name: (_) @define)
          (trait_declaration name: (_) @define) (enum_declaration name: (_) @define)
          (function_definition name: (_) @define)])
(namespace_definition body: (compound_statement
  [(class_declaration name: (_) @define) (interface_declaration name: (_) @define)
   (trait_declaration name: (_) @define) (enum_declaration name: (_) @define)
   (function_definition name: (_) @define)]))

(class_declaration body: (_) @members) @signature
(interface_declaration body: (_) @members) @signature
(trait_declaration body: (_) @members) @signature
(enum_declaration body: (_) @members) @signature
(method_declaration body: (_)? @body) @signature
(function_definition body: (_) @body) @signature

[(compound_statement) (if_statement) (for_statement) (foreach_statement) (while_statement) (do_statement)
 (switch_statement) (try_statement) (return_statement) (expression_statement) (echo_statement)
 (method_declaration) (function_definition) (class_declaration) (property_declaration) (else_clause)
 (else_if_clause) (catch_clause) (finally_clause) (case_statement) (arguments)
 (array_creation_expression)] @span
(assignment_expression right: (_) @span)
