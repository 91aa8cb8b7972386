(import_declaration (scoped_identifier) @import (asterisk)? @name)
(package_declaration [(scoped_identifier) (identifier)] @package)

(program (_ name: (identifier) @define))

(class_declaration body: (_) @members) @signature
(interface_declaration body: (_) @members) @signature
(enum_declaration body: (_) @members) @signature
(record_declaration body: (_) @members) @signature
(annotation_type_declaration body: (_) @body) @signature
(method_declaration body: (_)? @body) @signature
(constructor_declaration body: (_) @body) @signature

[(block) (if_statement) (for_statement) (enhanced_for_statement) (while_statement) (do_statement)
 (try_statement) (try_with_resources_statement) (switch_expression) (synchronized_statement)
 (return_statement) (throw_statement) (expression_statement) (local_variable_declaration) (field_declaration)
 (method_declaration) (constructor_declaration) (class_declaration) (catch_clause) (finally_clause)
 (switch_rule) (argument_list) (import_declaration)] @span
(if_statement alternative: (_) @span)
(variable_declarator value: (_) @span)
(assignment_expression right: (_) @span)
